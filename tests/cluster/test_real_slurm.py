"""Jobs of a real Slurm: queued again, preempted, out of time, killed, chained, cancelled.

Whatever happens to a run, its parameters at the end are bitwise those of an undisturbed one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from cluster.cluster_case import make_data, write_profile, write_recipe
from sweeps.sweep_files import write_sweep

from ttt_megatron.cluster.status import read_notes
from ttt_megatron.training.checkpoint_folder import list_checkpoints, resolve_checkpoint
from ttt_megatron.training.weights import read_weights

pytestmark = pytest.mark.slurm
TOOL = Path(__file__).parents[2] / "tools" / "local_slurm.sh"
PROGRAM = (sys.executable, "-m", "ttt_megatron.cli.main")
PATIENCE = 900
EVERY = 25
LONG = {"steps": 100_000, "save_interval": EVERY, "keep_last": 10_000}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The Slurm that SLURM_CONF names, or one that is started for these tests."""
    if "SLURM_CONF" in os.environ:
        yield
        return
    if os.geteuid() != 0:
        pytest.skip("starting a Slurm needs root; or let SLURM_CONF name one")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_SLURM", str(folder / "local"))
        patch.setenv("SLURM_CONF", str(folder / "local" / "slurm.conf"))
        subprocess.run([TOOL, "up"], check=True)
        try:
            yield
        finally:
            subprocess.run([TOOL, "down"], check=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("slurm-data"))


@pytest.fixture
def place(slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder from which is submitted; jobs that are left are cancelled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_profile(tmp_path / "profile.yaml")
    yield tmp_path
    for jobs in tmp_path.glob("*/jobs.jsonl"):
        for line in jobs.read_text().splitlines():
            subprocess.run(["scancel", json.loads(line)["job_id"]], check=False)


def _command(*words: str) -> str:
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _jobs(*words: str, nodes: int = 1, profile: str = "profile.yaml") -> list[str]:
    printed = _command("submit", *words, "--nodes", str(nodes), "--profile", profile)
    return [line.split()[1].strip(":") for line in printed.splitlines() if line.startswith("job ")]


def _wait(what: str, until: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline, f"{what}: {_logs()}"
        time.sleep(0.3)


def _logs() -> str:
    return "\n".join(path.read_text() for path in Path("runs").glob("*/slurm/*.log"))


def _step(run: str) -> int:
    found = list_checkpoints(Path(run, "checkpoints"))
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _state(job: str) -> str:
    return _asked("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def _wait_for_steps(run: str) -> None:
    metrics = Path(run, "metrics.jsonl")
    _wait("steps", lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5)


def _noted(run: str, job: str) -> str:
    return read_notes(Path(run, "slurm"), job)[0]


def _told(run: str, job: str) -> list[str]:
    """What the job's script said."""
    log = Path(run, "slurm", f"{job}.log").read_text()
    return [line for line in log.splitlines() if line.startswith(f"[job {job}, ")]


def _undisturbed(recipe: str, output: str, *overrides: str) -> None:
    _command("train", recipe, f"training.output={output}", *overrides)


def _same_parameters(one: str, other: str, checkpoint: str = "") -> None:
    """Of the newest checkpoints of two runs, or of those of this name."""
    within = Path("checkpoints", checkpoint) if checkpoint else ""
    first, second = (read_weights(resolve_checkpoint(Path(run, within))) for run in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _goes_on_exactly(recipe: str, run: str, job: str, stopped: int) -> None:
    """A checkpoint that comes after the stop is that of a run that was not disturbed."""
    after = f"step-{(stopped // EVERY + 1) * EVERY:08d}"
    _wait(f"{after} of {run}", lambda: Path(run, "checkpoints", after).exists())
    log = Path(run, "slurm", f"{job}.log").read_text()
    assert f"stopped after step {stopped} of 100000, saved in" in log
    assert f"from step {stopped}:" in "\n".join(_told(run, job))
    _command("cancel", job)
    words = [recipe, "parallel.data=1", "training.output=plain"]
    plain = subprocess.Popen([*PROGRAM, "train", *words])
    _wait(f"{after} undisturbed", lambda: Path("plain", "checkpoints", after).exists())
    plain.terminate()
    assert plain.wait(timeout=PATIENCE) in (0, 128 + signal.SIGTERM)
    _same_parameters(run, "plain", after)


def test_a_chain_goes_on_whatever_happens_to_it(place: Path, data: Path) -> None:
    """Stage 1 is queued again from outside, and loses its launcher; stage 2 starts from it."""
    write_recipe(place / "one.yaml", data, "runs/one", steps=200)
    write_recipe(place / "two.yaml", data, "runs/two", steps=20)
    first, second = _jobs("one.yaml", "--then", "two.yaml", nodes=2)
    _wait("the first checkpoint", lambda: _step("runs/one") >= 10)
    assert _state(second) == "PENDING"
    status = {row["job_id"]: row for row in json.loads(_command("status", "--json"))}
    assert status[first]["slurm_state"] == "RUNNING"
    assert status[second]["state"] == "waiting (Dependency)"
    _asked("scontrol", "requeue", first)
    _wait("attempt 2", lambda: "attempt 2," in "\n".join(_told("runs/one", first)))
    before = _step("runs/one")
    _wait("a new checkpoint", lambda: _step("runs/one") > before)
    launcher = next(
        process
        for process in psutil.process_iter(["cmdline"])
        if f"{first}.2" in (process.info["cmdline"] or [])
        and "ttt_megatron.parallel.node" in process.info["cmdline"][:3]
    )
    launcher.send_signal(signal.SIGKILL)
    _wait("stage 2", lambda: _noted("runs/two", second) == "finished")
    told = "\n".join(_told("runs/one", first))
    assert "attempt 2, " in told
    assert "failed (exit status" in told
    assert "attempt 3, " in told
    assert "finished: step 200" in told
    _undisturbed("one.yaml", "plain/one")
    _undisturbed("two.yaml", "plain/two", "training.init_from=plain/one")
    _same_parameters("runs/one", "plain/one")
    _same_parameters("runs/two", "plain/two")
    rows = {row["job_id"]: row for row in json.loads(_command("status", "--json"))}
    assert [rows[job]["state"] for job in (first, second)] == ["finished", "finished"]
    assert "attempt 3" in _command("logs", first)
    assert "attempt 1" not in _command("logs", first)


def test_a_job_saves_at_its_time_limit_and_goes_on(place: Path, data: Path) -> None:
    write_recipe(place / "long.yaml", data, "runs/long", **LONG)
    write_profile(place / "short.yaml", warning_seconds=90)
    (job,) = _jobs("long.yaml", "parallel.data=1", profile="short.yaml")
    _wait_for_steps("runs/long")
    # From now on between one and two minutes are left, and the warning comes 90 seconds before.
    minutes = int(_asked("squeue", "--noheader", f"--jobs={job}", "--format=%M").split(":")[-2])
    _asked("scontrol", "update", f"jobid={job}", f"timelimit={minutes + 2}")
    _wait("the end of attempt 1", lambda: "queued again" in "\n".join(_told("runs/long", job)))
    saved = _step("runs/long")
    _asked("scontrol", "update", f"jobid={job}", "timelimit=60")
    told = "\n".join(_told("runs/long", job))
    assert "asked to end: the run saves after its current step" in told
    assert f"stopped at step {saved}, as asked; queued again" in told
    _goes_on_exactly("long.yaml", "runs/long", job, saved)


def test_a_save_that_reaches_the_time_limit_is_queued_again(place: Path, data: Path) -> None:
    """Slurm would end such a job for good. The run here only ever saves."""
    write_recipe(place / "slow.yaml", data, "runs/slow")
    (place / "python").write_text("#!/bin/bash\ntrap '' TERM\nsleep 1000\n")
    (place / "python").chmod(0o755)
    limits = {"time_limit": "2", "warning_seconds": 60}
    write_profile(place / "slow-profile.yaml", python=str(place / "python"), **limits)
    (job,) = _jobs("slow.yaml", "parallel.data=1", profile="slow-profile.yaml")
    log = place / "runs" / "slow" / "slurm" / f"{job}.log"
    _wait("attempt 2", lambda: log.exists() and "attempt 2, " in log.read_text())
    told = log.read_text()
    assert "the time limit is near and the run still saves; queued again" in told
    assert "asked to end: the run saves after its current step" in told
    # Counted as an attempt that brought nothing.
    notes = (place / "runs" / "slow" / "slurm" / f"{job}.state").read_text()
    assert notes == "0 1 running 2\n"


def test_a_preempted_job_saves_and_goes_on(place: Path, data: Path) -> None:
    write_recipe(place / "low.yaml", data, "runs/low", **LONG)
    (job,) = _jobs("low.yaml", "parallel.data=1")
    _wait_for_steps("runs/low")
    words = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null"]
    other = _asked("sbatch", "--parsable", *words, "--wrap", "sleep 5")
    _wait("the other job", lambda: _state(other) == "COMPLETED")
    saved = _step("runs/low")
    _wait("attempt 2", lambda: "attempt 2, " in "\n".join(_told("runs/low", job)))
    _goes_on_exactly("low.yaml", "runs/low", job, saved)


def test_a_cancelled_job_saves_and_takes_along_what_waits_for_it(place: Path, data: Path) -> None:
    write_recipe(place / "one.yaml", data, "runs/one", steps=100_000, save_interval=100_000)
    write_recipe(place / "two.yaml", data, "runs/two")
    first, second = _jobs("one.yaml", "--then", "two.yaml", nodes=2)
    _wait_for_steps("runs/one")
    printed = _command("cancel", first)
    assert f"job {first} (one): saves after its current step and ends" in printed
    assert f"job {second} (two): cancelled" in printed
    _wait("the end", lambda: _state(first) == "CANCELLED")
    assert _state(second) == "CANCELLED"
    assert _step("runs/one") > 0
    assert (
        "cancelled; the same recipe, submitted anew, goes on from step"
        in _told("runs/one", first)[-1]
    )
    rows = {row["job_id"]: row for row in json.loads(_command("status", "--json"))}
    assert rows[first]["state"] == "cancelled"


def test_an_error_that_would_come_again_ends_the_job(place: Path, data: Path) -> None:
    """The recipe is changed, after its submission, into another run's."""
    write_recipe(place / "one.yaml", data, "runs/one", steps=20)
    _undisturbed("one.yaml", "runs/one", "parallel.data=1")
    write_recipe(place / "two.yaml", data, "runs/two")
    held = _asked("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true")
    first, second = _jobs("one.yaml", "--after", held, "--then", "two.yaml", nodes=2)
    write_recipe(place / "one.yaml", data, "runs/one", steps=30)
    _asked("scontrol", "release", held)
    _wait("the end", lambda: _state(first) == "FAILED")
    (*_, last) = _told("runs/one", first)
    assert "attempt 1, " in last
    assert "not tried again, as the same would come of it: rank" in last
    assert "training.steps is 30 and was 20" in last
    _wait("stage 2's end", lambda: _state(second) == "CANCELLED")


def test_a_sweep_is_an_array(place: Path, data: Path) -> None:
    write_sweep(place, data, axes={"inner.lr": [1, 2]})
    printed = _command("sweep", "sweep.yaml", "--slurm", "--profile", "profile.yaml")
    job = printed.split()[1].strip(":")
    folder = place / "out" / "slurm"
    tasks = [f"{job}_0", f"{job}_1"]

    _wait("both tasks", lambda: all(read_notes(folder, one)[0] == "finished" for one in tasks))
    rows = json.loads(_command("status", "--root", "out", "--json"))
    assert [row["job_id"] for row in rows] == tasks
    assert all(row["state"] == "finished" and row["checkpoint"] == 3 for row in rows)
    assert "finished" in (folder / f"{job}_1.log").read_text()
    assert "finished" in _command("logs", "--root", "out", f"{job}_0")


def test_tasks_of_an_array_end_and_are_queued_again_one_by_one(place: Path, data: Path) -> None:
    """Also the last one, whose SLURM_JOB_ID is the number of the array."""
    write_sweep(place, data, axes={"inner.lr": [1, 2]})
    words = ["--slurm", "--profile", "profile.yaml", "training.steps=100000"]
    job = _command("sweep", "sweep.yaml", *words).split()[1].strip(":")
    logs = [place / "out" / "slurm" / f"{job}_{index}.log" for index in (0, 1)]
    points = json.loads((place / "out" / "jobs.jsonl").read_text())["tasks"]
    for index in ("0", "1"):
        _wait_for_steps(points[index])
    _asked("scancel", "--batch", "--signal=TERM", f"{job}_1")
    _wait("task 1's next attempt", lambda: "attempt 2, " in logs[1].read_text())
    assert "as asked; queued again, to go on from step" in logs[1].read_text()
    assert "asked to end" not in logs[0].read_text()
    # Queued again, it waits for some seconds.
    _asked("scontrol", "requeue", f"{job}_1")
    _wait("task 1 in the queue", lambda: _state(f"{job}_1") == "PENDING")
    printed = _command("cancel", "--root", "out", job)
    assert "1 running tasks save after their current steps and end, 1 others cancelled" in printed
    _wait("task 0's end", lambda: _state(f"{job}_0") == "CANCELLED")
    assert _state(f"{job}_1") == "CANCELLED"
    assert "cancelled; the same recipe, submitted anew, goes on from" in logs[0].read_text()
    assert read_notes(place / "out" / "slurm", f"{job}_0")[0] == "cancelled"
