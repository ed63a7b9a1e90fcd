"""`submit` as a user calls it, without a cluster: every recipe, chains, and what is refused."""

import re
import subprocess
from pathlib import Path

import pytest
from cluster.cluster_case import write_profile, write_recipe

from ttt_megatron.cli.main import main
from ttt_megatron.cluster.records import JobRecord, add_record

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.name not in ("base.yaml", "layouts.yaml") and path.parent.name != "sweeps"
)


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    """No Slurm on the PATH, and a folder to work in with a profile."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    write_profile(tmp_path / "p.yaml")
    return tmp_path


def test_every_recipe_makes_a_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(RECIPES) > 40
    for number, recipe in enumerate(RECIPES):
        # Planning all of them would take a minute.
        published = re.match(r"recipes/\d+[mb]/", recipe)
        words = ["parallel.data=8"] if published else ["--profile", "cpu"]
        assert main(["submit", recipe, *words, "--dry-run"]) == 0, recipe
        text, warned = capsys.readouterr()
        assert "warning: from here it would not be submitted: " in warned
        assert text.startswith("#!/bin/bash\n# ---- stage 1 of 1:\n# mkdir -p ")
        assert f"    {recipe}\n" in text
        assert ("#SBATCH --gpus-per-node=8\n" in text) == bool(published)
        (tmp_path / f"{number}.sh").write_text(text)
    scripts = sorted(map(str, tmp_path.glob("*.sh")))
    subprocess.run(
        ["bash", "-c", 'for one; do bash -n "$one" || exit 1; done', "-", *scripts], check=True
    )


def test_a_chain_is_shown_whole(no_slurm, capsys):
    data = no_slurm / "data"
    write_recipe(no_slurm / "one.yaml", data, "runs/one")
    write_recipe(no_slurm / "two.yaml", data, "runs/two")
    words = [
        "submit",
        "one.yaml",
        "optimizer.lr=1e-3",
        "--after",
        "12",
        "13",
        "--profile",
        "p.yaml",
    ]
    words += ["--nodes", "2", "--dry-run", "--then", "two.yaml", "training.steps=5"]
    assert main([*words, "--then", "two.yaml", "training.output=runs/three"]) == 0
    first, second, third = capsys.readouterr().out.split("# ---- stage ")[1:]
    made = f"# mkdir -p {no_slurm}/runs"
    waits = "--kill-on-invalid-dep=yes SCRIPT\n"
    assert first.startswith(
        f"1 of 3:\n{made}/one/slurm\n# sbatch --dependency=afterok:12:13 {waits}"
    )
    assert second.startswith(
        f"2 of 3:\n{made}/two/slurm\n# sbatch --dependency=afterok:JOB_OF_STAGE_1 {waits}"
    )
    assert "    optimizer.lr=1e-3\n" in first
    assert "training.init_from" not in first
    assert "    training.steps=5\n    training.init_from=runs/one\n" in second
    assert "optimizer.lr" not in second
    assert "    training.output=runs/three\n    training.init_from=runs/two\n" in third
    assert not (no_slurm / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.yaml"], "none.yaml: there is no such recipe"),
        (["one.yaml", "training.stepz=4"], "the nearest known key is training.steps"),
        (["one.yaml", "training.device=cuda"], "nodes of profile p have no GPUs"),
        (["one.yaml", "--then", "one.yaml"], "both write to training.output=runs/one"),
        (["one.yaml", "--then", "two.yaml", "training.init_from=x"], "a stage of a chain starts"),
        (["one.yaml", "--after", "yesterday"], "--after yesterday: give the number of a job"),
        (["one.yaml", "training.micro_batch_size=3"], "is not a multiple of"),
        (["one.yaml"], "nowhere/index.json is missing: data.path must be a folder"),
        (["one.yaml", "data.path="], "data.path is empty"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(no_slurm, capsys, words, said):
    write_recipe(no_slurm / "one.yaml", Path("nowhere"), "runs/one")
    write_recipe(no_slurm / "two.yaml", Path("nowhere"), "runs/two")
    assert main(["submit", *words, "--profile", "p.yaml", "--nodes", "2"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (no_slurm / "runs").exists()


def test_a_dry_run_warns_of_what_would_be_refused(no_slurm, trained_run, capsys):
    write_recipe(no_slurm / "one.yaml", Path("nowhere"), "runs/one")
    sound = write_recipe(no_slurm / "two.yaml", trained_run.data, "runs/two")
    words = ["--profile", "p.yaml", "--nodes", "2", "--dry-run"]
    assert main(["submit", str(sound), *words]) == 0
    text, warned = capsys.readouterr()
    assert warned == ""
    assert "# sbatch SCRIPT\n" in text
    # The commands in the heading are all that it takes.
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# mkdir")]
    subprocess.run(["/bin/bash", "-c", f"PATH=/bin:/usr/bin; {lines[0]}"], check=True)
    (log,) = re.findall(r"^#SBATCH --output=(.*)/%j.log$", text, re.M)
    assert Path(log).is_dir()
    words.append("training.init_from=runs/none")
    assert main(["submit", "one.yaml", *words]) == 0
    text, warned = capsys.readouterr()
    assert text.startswith("#!/bin/bash\n")
    data, start = warned.splitlines()
    assert data.startswith("warning: from here it would not be submitted: nowhere/index.json is")
    assert "runs/none holds no checkpoint" in start


def test_without_slurm_one_sentence_says_so(no_slurm, trained_run, capsys):
    path = write_recipe(no_slurm / "one.yaml", trained_run.data, "runs/one")
    assert main(["submit", str(path), "--nodes", "2", "--profile", "p.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no sbatch on this machine: do it on a login node of a Slurm cluster, or "
        "look at the script with --dry-run\n"
    )
    record = JobRecord(
        **{"job_id": "1", "name": "one", "recipe": "r", "overrides": [], "output": "/o"},
        **{"script": "/s", "folder": "/f", "time": "", "nodes": 1, "processes": 1},
        **{"profile": "p", "commit": "", "user": "me", "after": [], "steps": 1},
    )
    add_record(Path("runs"), record)
    for words in (["status"], ["cancel", "1"]):
        assert main(words) == 2
        assert "there is no squeue on this machine" in capsys.readouterr().err
    assert main(["logs", "1"]) == 2
    assert capsys.readouterr().err == "error: job 1 has not begun, there is no /f/1.log yet\n"


def test_a_start_that_is_nowhere_and_other_runs_in_the_folder_are_refused(
    no_slurm, trained_run, capsys
):
    path = write_recipe(no_slurm / "one.yaml", trained_run.data, str(trained_run.output))
    words = [str(path), "--nodes", "2", "--profile", "p.yaml"]
    assert main(["submit", *words]) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err
    words += ["training.output=runs/new", "training.init_from=runs/none"]
    assert main(["submit", *words]) == 2
    assert "runs/none holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_jobs_that_there_are_not_are_refused(no_slurm, capsys, command):
    assert main([command, *([] if command == "status" else ["9"])]) == 2
    assert "runs/jobs.jsonl" in capsys.readouterr().err
