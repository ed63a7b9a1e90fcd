"""The watchdog on file systems that hang and fail, with an end that ends its thread alone."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ttt_megatron.resilience.events import read_events
from ttt_megatron.training.callbacks import watchdog
from ttt_megatron.training.callbacks.watchdog import Watchdog

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

Start = Callable[..., threading.Event]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts one, of rank 0 in a run that finishes nothing; the event is set at its end."""
    ended, dogs = threading.Event(), list[Watchdog]()

    def end(status: int) -> None:
        assert status == 1
        ended.set()
        raise SystemExit

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(watchdog, "_WRITING_SECONDS", 0.5)

    def start(limit: float, grace: float, world: int = 1) -> threading.Event:
        monkeypatch.setattr(watchdog, "_GRACE_SECONDS", grace)
        groups = SimpleNamespace(rank=0, world_size=world)
        trainer: Any = SimpleNamespace(
            parts=SimpleNamespace(groups=groups), progress=SimpleNamespace(step=7)
        )
        dogs.append(Watchdog(tmp_path, limit))
        dogs[-1].on_start(trainer)
        return ended

    yield start
    for dog in dogs:  # none is to come to the real end
        dog._thread.join(30)


def test_stacks_of_all_threads_are_written(start: Start, tmp_path: Path) -> None:
    let_go = threading.Event()
    waiting = threading.Thread(target=let_go.wait, name="waits in vain")
    waiting.start()
    assert start(0.2, 0.1).wait(20)
    let_go.set()
    [stacks] = (tmp_path / "stacks").iterdir()
    text = stacks.read_text()
    assert "after step 7" in text
    assert "Thread waits in vain (" in text
    assert "threading.py" in text
    assert "test_watchdog.py" in text
    [event] = read_events(tmp_path)
    assert event.message.endswith(
        f"where the ranks stood is in {tmp_path / 'stacks'}. The same command goes on from the "
        f"last checkpoint"
    )


def test_a_rank_that_looks_a_pause_later_is_not_called_gone(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_LOOKS_A_LIMIT", 1)
    ended = start(1.5, 0.2, world=2)
    stacks = tmp_path / "stacks"
    deadline = time.monotonic() + 20
    while not (stacks.is_dir() and any(stacks.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.6)
    (stacks / "rank-1-later.txt").touch()
    assert ended.wait(20)
    [event] = read_events(tmp_path)
    assert "wrote nothing" not in event.message


def test_a_file_system_that_hangs_keeps_no_process(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A pipe that nobody reads from: opening it to write takes for ever.
    (tmp_path / "stacks").mkdir()
    os.mkfifo(tmp_path / "events.jsonl")
    for seconds in range(60):
        then = time.strftime("%Y%m%d-%H%M%S", time.localtime(time.time() + seconds))
        os.mkfifo(tmp_path / "stacks" / f"rank-0-{then}.txt")
    assert start(0.2, 0.1).wait(20)
    told = capfd.readouterr().err
    assert "test_watchdog.py" in told
    assert "where the ranks stood is in rank 0's stderr" in told


def test_a_file_system_that_fails_keeps_no_process(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "glob", fail)
    assert start(0.2, 0.1).wait(20)
    [event] = read_events(tmp_path)
    assert "nothing finished for" in event.message
