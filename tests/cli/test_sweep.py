"""`sweep` as a user calls it: what is refused, listed, written for a batch system, and run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sweeps.sweep_files import read_points, write_sweep

from ttt_megatron.cli.main import main
from ttt_megatron.sweeps.results import read_results
from ttt_megatron.training.checkpoint_folder import list_checkpoints


@pytest.mark.parametrize(
    ("keys", "words", "said"),
    [
        ({"axes": {"inner.lrr": [1]}}, [], "unknown key inner.lrr; the nearest known key is"),
        ({"axes": {"model.window_size": [4]}}, [], "1 of 1 points cannot run: point window_size-4"),
        ({"axes": {"inner.lr": [1]}}, ["--only", "lr-1"], "the nearest is inner.lr-1"),
        ({"axes": {"inner.lr": [1]}}, ["--only-index", "7"], "the 1 points are 0 to 0"),
        ({"axes": {"inner.lr": [1]}}, ["--jobs", "0"], "--jobs 0: give 1 or more"),
        ({"axes": {"inner.lr": [1]}}, ["nonsense"], "write key=value"),
        ({"axes": {"inner.lr": [1]}}, ["data.path=/nowhere"], "point inner.lr-1: "),
        (
            {"seeds": [1], "measure": {"evaluate": {"document": 3}}},
            [],
            "measure.evaluate: unknown key document; the nearest known key is documents",
        ),
        (
            {"seeds": [1], "measure": {"evaluate": {"documents": "many"}}},
            [],
            "measure.evaluate: argument --documents: invalid int value: 'many'",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused(trained_run, tmp_path, capsys, keys, words, said):
    path = write_sweep(tmp_path, trained_run.data, **keys)
    assert main(["sweep", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_and_leaves_nothing(trained_run, tmp_path, capsys):
    path = write_sweep(tmp_path, trained_run.data, axes={"inner.lr": [1, 2]}, seeds=[1])
    words = ["--only", "inner.lr-2_seed-1", "training.steps=7"]
    assert main(["sweep", str(path), "--dry-run", *words]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ 1 +│ inner.lr-2_seed-1 +│ inner.lr=2 +│ 1 +│ step 0 of 7 │", printed)
    assert "inner.lr-1_seed-1" not in printed
    assert "1 points, 7 steps in all" in printed
    assert not (tmp_path / "out").exists()


def _array(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The script's lines; bash finds nothing wrong with it."""
    assert main(["sweep", str(path), "--slurm", "--dry-run", *words]) == 0
    text = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert not (path.parent / "out").exists()
    return text.splitlines()


def test_the_array_has_a_task_a_point(trained_run, tmp_path, capsys):
    path = write_sweep(tmp_path, trained_run.data, axes={"inner.lr": [1, 2, 3, 4]})
    lines = _array(path, capsys, "--jobs", "2", "inner.clip=0.5")
    assert "#SBATCH --array=0-3%2" in lines
    assert not any(line.startswith("#SBATCH --gpus") for line in lines)
    words = [line.strip() for line in lines]
    first = words.index("sweep")
    assert words[first : first + 7] == [
        *("sweep", str(path), "--output", str(tmp_path / "out"), "inner.clip=0.5"),
        *("--only-index", '"$SLURM_ARRAY_TASK_ID"'),
    ]
    assert f"[3]={tmp_path / 'out' / 'points' / 'inner.lr-4'}" in words
    chosen = ["--only", "inner.lr-1", "inner.lr-4", "inner.lr-3", "training.device=auto"]
    lines = _array(path, capsys, *chosen, "--profile", "default")
    assert "#SBATCH --array=0,2-3" in lines
    assert "#SBATCH --gpus-per-node=1" in lines


def test_a_point_larger_than_a_node_is_refused(trained_run, tmp_path, capsys):
    path = write_sweep(tmp_path, trained_run.data, axes={"inner.lr": [1]})
    words = ["training.global_batch_size=16", "training.micro_batch_size=1", "parallel.data=16"]
    assert main(["sweep", str(path), "--slurm", "--dry-run", *words]) == 2
    assert "a point takes 16 processes, and a node of profile default has 8" in (
        capsys.readouterr().err
    )


def _sweep(path: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ttt_megatron.cli.main", "sweep", str(path), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_point_fails_alone_and_goes_on(trained_run, tmp_path):
    path = write_sweep(
        tmp_path,
        trained_run.data,
        axes={"inner.lr": [1, 2]},
        set={"training.steps": 120, "training.save_interval": 10},
    )
    out = tmp_path / "out"
    process = _sweep(path, "--jobs", "2")
    _wait_for(out / "points" / "inner.lr-2" / "checkpoints", "step-00000010/info.json", process)
    (training,) = [
        child
        for child in psutil.Process(process.pid).children()
        if str(out / "recipes" / "inner.lr-2.yaml") in child.cmdline()
    ]
    training.kill()
    printed, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "FAILED: inner.lr-2, killed by SIGKILL; its log ends" in error
    assert re.search(r"inner.lr-2: failed, step \d+ of 120, killed by SIGKILL", printed)
    first, second = read_results(out).points
    assert (first.status, second.status) == ("finished", "failed")
    assert 10 <= second.step < 120
    before = (out / "points" / "inner.lr-1" / "metrics.jsonl").stat().st_mtime_ns
    process = _sweep(path)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "inner.lr-1" not in error
    assert [point.status for point in read_results(out).points] == ["finished", "finished"]
    assert "going on from" in (out / "logs" / "inner.lr-2.log").read_text()
    assert (out / "points" / "inner.lr-1" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_children_in_good_order(trained_run, tmp_path, number):
    path = write_sweep(
        tmp_path,
        trained_run.data,
        axes={"inner.lr": [1, 2]},
        set={"training.steps": 2000, "training.save_interval": 2000},
    )
    point = tmp_path / "out" / "points" / "inner.lr-1"
    process = _sweep(path)
    _wait_for(point, "metrics.jsonl", process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert "interrupted; the same command goes on" in error
    assert not any(child.is_running() for child in family)
    (saved,) = list_checkpoints(point / "checkpoints")
    assert int(saved.name[-8:]) < 2000
    first, second = read_results(tmp_path / "out").points
    assert (first.status, second.status) == ("begun", "not begun")


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_run_behind(trained_run, tmp_path):
    path = write_sweep(tmp_path, trained_run.data, seeds=[1], set={"training.steps": 2000})
    process = _sweep(path)
    _wait_for(tmp_path / "out" / "points" / "base_seed-1", "metrics.jsonl", process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive


@pytest.mark.slow
def test_a_task_of_the_array_trains_its_point_and_evaluates_it(trained_run, tmp_path, capsys):
    from mlflow.tracking import MlflowClient

    path = write_sweep(
        tmp_path,
        trained_run.data,
        axes={"inner.mode": ["meta", "off"]},
        set={"tracking.mlflow": True},
        measure={"evaluate": {"documents": 3, "length": 32}},
    )
    script, tools = tmp_path / "sweep.sbatch", tmp_path / "tools"
    lines = _array(path, capsys)
    script.write_text("\n".join(lines))
    (folder,) = [line.removeprefix("folder=").split()[0] for line in lines if "folder=/" in line]
    Path(folder).mkdir(parents=True)
    tools.mkdir()
    # It starts the command that follows its own options.
    (tools / "srun").write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
    (tools / "srun").chmod(0o755)
    slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "here"}
    for task in ("1", "0"):
        environment = {**os.environ, **slurm, "SLURM_ARRAY_TASK_ID": task, "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{tools}:{environment['PATH']}"
        environment.pop("MLFLOW_TRACKING_URI", None)
        shown = subprocess.run(
            ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert shown.returncode == 0, shown.stderr
    results = read_results(tmp_path / "out")
    assert [point.status for point in results.points] == ["finished", "finished"]
    assert set(results.points[0].values) == {"validation_loss", "evaluated, on", "evaluated, off"}
    assert set(results.points[1].values) == {"validation_loss", "evaluated, off"}
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("ttt-megatron").experiment_id])
    parents = [run.data.tags.get("mlflow.parentRunId") for run in runs]
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert sorted(filter(None, parents)) == [parent.info.run_id] * 2
    assert parent.info.status == "FINISHED"
    # Nothing is left to do, and that is quick to see.
    shutil.rmtree(tmp_path / "out" / "logs")
    _, points, _ = read_points(path)
    assert main(["sweep", str(path)]) == 0
    assert not (tmp_path / "out" / "logs").exists()
    assert len(points) == 2
