"""The journal: whole lines only, each step once, whatever happened to its writer."""

import json
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ttt_megatron.tracking import journal
from ttt_megatron.tracking.complete import rows_as_records
from ttt_megatron.tracking.journal import Journal, metrics_record, read_records
from ttt_megatron.tracking.recorder import Recorder
from ttt_megatron.tracking.steps import StepSet


def _losses(path: Path) -> list[tuple[int, float]]:
    records, _ = read_records(path, 0)
    return [(r["step"], r["values"]["loss"]) for r in records if "loss" in r.get("values", {})]


def test_steps_are_a_set() -> None:
    generator = random.Random(1)
    for _ in range(50):
        known, steps = set(), StepSet()
        for _ in range(60):
            step = generator.randrange(40)
            assert (step in steps) == (step in known)
            known.add(step)
            steps.add(step)
        assert [step for step in range(-1, 41) if step in steps] == sorted(known)


def test_a_step_is_written_once_and_gaps_are_filled(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    journal = Journal(path)
    journal.append([metrics_record({"loss": step / 8}, step, 100 + step) for step in (1, 2, 4)])
    again = Journal(path)
    rows = [{"step": s, "loss": 9.0, "seconds": 1.0, "time": 5.5} for s in (1, 2, 3, 4, 5)]
    rows.append({"step": 5, "validation_loss": 2.0})
    rows.append({"step": 6, "loss": None})
    assert again.append(rows_as_records(rows, 77)) == 3
    assert _losses(path) == [(1, 1 / 8), (2, 2 / 8), (4, 4 / 8), (3, 9.0), (5, 9.0)]
    records, _ = read_records(path, 0)
    assert [record["time"] for record in records[-3:]] == [5500, 5500, 77]
    assert records[-1]["values"] == {"validation_loss": 2.0}
    # Within one call too, and what is no number is no metric.
    twice = [metrics_record({"loss": 1.0, "bad": float("nan")}, 7, 1)] * 2
    assert again.append(twice) == 1


def test_a_step_that_another_writer_has_appended_is_not_written_again(tmp_path: Path) -> None:
    """As `upload` does from the metrics log while the run trains."""
    path = tmp_path / "tracking.jsonl"
    run = Journal(path)
    run.append([metrics_record({"loss": 1.0}, 1, 100)])
    upload = Journal(path)
    assert upload.append(rows_as_records([{"step": 2, "loss": 2.0, "time": 0.2}], 77)) == 1
    with path.open("ab") as file:  # and was killed
        file.write(b'{"kind": "metr')
    both = [metrics_record({"loss": 2.0}, 2, 201), metrics_record({"loss": 3.0}, 3, 300)]
    assert run.append(both) == 1
    assert upload.append([metrics_record({"loss": 3.0}, 3, 301)]) == 0
    assert _losses(path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_torn_line_is_cut_and_reading_goes_by_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    Journal(path).append([metrics_record({"loss": 1.0}, 1, 1)])
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"kind": "metrics", "step": 2, "ti')
    assert read_records(path, 0)[1] == whole
    journal = Journal(path)
    assert path.stat().st_size == whole
    journal.append([metrics_record({"loss": 2.0}, 2, 1), metrics_record({"loss": 3.0}, 3, 1)])
    records, after = read_records(path, whole, limit=1)
    assert [record["step"] for record in records] == [2]
    assert [record["step"] for record in read_records(path, after)[0]] == [3]


def test_what_has_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    journal = Journal(path)
    journal.append([metrics_record({"loss": 1.0}, 1, 1)])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            journal.append([metrics_record({"loss": 2.0}, 2, 1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert journal.append([metrics_record({"loss": 2.0}, 2, 1)]) == 1
    assert _losses(path) == [(1, 1.0), (2, 2.0)]


_KILLED = """
import sys, threading, time
from pathlib import Path
from ttt_megatron.tracking.journal import Journal, metrics_record
from ttt_megatron.tracking.recorder import Recorder
recorder = Recorder(Journal(Path(sys.argv[1])), threading.Event())
for step in range(1, 1_000_000):
    recorder.put(metrics_record({"loss": float(step)}, step, step))
    time.sleep(0.001)
"""


def test_a_kill_leaves_every_step_that_was_written_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", _KILLED, path])
    deadline = time.monotonic() + 60
    while (there := len(_losses(path))) < 100:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    Journal(path)
    for line in path.read_text().splitlines():
        json.loads(line)
    steps = [step for step, _ in _losses(path)]
    assert len(steps) >= there
    assert steps == list(range(1, len(steps) + 1))


def test_nothing_waits_for_a_disk_that_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    journal = Journal(path)
    held, go = threading.Event(), threading.Event()

    def stuck() -> list[dict[str, object]]:
        held.set()
        go.wait()
        return []

    recorder = Recorder(journal, threading.Event())
    recorder.put(stuck)
    assert held.wait(10)

    def put() -> None:
        for step in range(20_000):
            recorder.put(metrics_record({"loss": 1.0}, step, 1))

    putting = threading.Thread(target=put, daemon=True)
    putting.start()
    putting.join(60)
    assert not putting.is_alive()
    go.set()
    # Those of the last moment: the queue is bounded. Its end finds room once it has been emptied.
    deadline = time.monotonic() + 20
    while len(_losses(path)) < 10_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    recorder.close(10)
    assert [step for step, _ in _losses(path)] == list(range(10_000))


def test_a_rewound_run_writes_its_steps_again(tmp_path: Path) -> None:
    written = Journal(tmp_path / "journal.jsonl")
    back = {"kind": journal.EVENT, "event": journal.REWOUND, "step": 2, "time": 7}
    first = [metrics_record({"loss": 1.0 / step}, step, step) for step in (1, 2, 3, 4)]
    again = [metrics_record({"loss": 9.0}, step, 10 + step) for step in (2, 3)]
    assert written.append([*first, back, *again]) == 6
    steps = [r["step"] for r in read_records(written.path, 0)[0] if r["kind"] == journal.METRICS]
    assert steps == [1, 2, 3, 4, 3]
    # Read again, it knows what it had.
    assert Journal(written.path).append([*first, *again]) == 1
