"""Processes of a sweep: in order, a few at a time, ended in good order; here of a line each."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from sweeps.sweep_files import write_sweep

from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.job import Job, evaluate_words
from ttt_megatron.sweeps.points import make_points
from ttt_megatron.sweeps.progress import SweepProgress
from ttt_megatron.sweeps.runner import run_jobs, share_devices
from ttt_megatron.sweeps.state import PointState
from ttt_megatron.sweeps.sweep_file import read_sweep


@pytest.fixture
def points(tmp_path):
    """Three points of a sweep."""
    path = write_sweep(tmp_path, tmp_path, axes={"inner.lr": [1, 2, 3]})
    return make_points(read_sweep(path), tmp_path / "out")


def _run(jobs, points, at_once):
    states = {point.name: PointState(step=0, steps=3) for point in points}
    with SweepProgress(points, states) as progress:
        return run_jobs(jobs, at_once, progress)


def _job(point, folder: Path, *programs: str) -> Job:
    commands = [[sys.executable, "-c", program] for program in programs]
    return Job(point, commands, folder / f"{point.name}.log")


def test_one_that_fails_stops_no_other(points, tmp_path, capsys):
    mark = "import pathlib; pathlib.Path({!r}).touch()"
    after, last = str(tmp_path / "after"), str(tmp_path / "last")
    jobs = [
        _job(
            points[0], tmp_path, "print('first'); print(); raise SystemExit(3)", mark.format(after)
        ),
        _job(points[1], tmp_path, "import os; os.kill(os.getpid(), 9)"),
        _job(points[2], tmp_path, "print('first')", f"print('second'); {mark.format(last)}"),
    ]
    ended = _run(jobs, points, 2)
    assert ended.stop_signal is None
    told = {name: (f.reason, f.last_lines) for name, f in ended.failures.items()}
    assert told == {
        "inner.lr-1": ("exit status 3", ["first"]),
        "inner.lr-2": ("killed by SIGKILL", []),
    }
    assert not Path(after).exists()
    assert Path(last).exists()
    assert jobs[2].log.read_text() == "first\nsecond\n"
    error = capsys.readouterr().err
    assert "[3/3] inner.lr-3 done" in error
    assert "inner.lr-1 FAILED, exit status 3: " in error


_SLEEPS = "import time; print('begun', flush=True); time.sleep(300)"
_DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {_SLEEPS}"


@pytest.fixture
def interruptible():
    """SIGINT as a terminal's programs have it; those begun in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("program", "signals"), [(_SLEEPS, 1), (_DEAF, 2)])
def test_a_signal_asks_and_a_second_one_kills(points, tmp_path, program, signals, interruptible):
    jobs = [_job(point, tmp_path, program, _SLEEPS) for point in points]

    def interrupt():
        for _ in range(signals):
            while not jobs[0].log.exists() or not jobs[0].log.read_text():
                time.sleep(0.02)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    start = time.monotonic()
    thread.start()
    ended = _run(jobs, points, 1)
    thread.join()
    assert time.monotonic() - start < 60
    assert (ended.stop_signal, ended.failures) == (signal.SIGINT, {})
    assert not jobs[1].log.exists(), "what waits is not begun"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_runs_at_once_have_gpus_of_their_own():
    devices = ["0", "2", "5", "7", "8"]
    assert share_devices(devices, 2, 2) == [
        {"CUDA_VISIBLE_DEVICES": "0,2"},
        {"CUDA_VISIBLE_DEVICES": "5,7"},
    ]
    with pytest.raises(UserError, match=r"--jobs 3: runs of 2 processes need 6 GPUs"):
        share_devices(devices, 3, 2)


def test_options_of_an_evaluation_as_words():
    options = {"documents": 3, "task": ["position", "needle"], "flag": True}
    words = ["--documents", "3", "--task", "position", "--task", "needle", "--flag"]
    assert evaluate_words(options) == words
