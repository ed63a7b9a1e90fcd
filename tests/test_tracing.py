"""Spans are recorded, written and drawn."""

import json
import sys
import time
from pathlib import Path

import plot_trace
import pytest

from ttt_megatron.errors import UserError
from ttt_megatron.tracing import span, start_trace, stop_trace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in range(2):
        trace = start_trace(rank)
        try:
            with span("outer"):
                with span("inner"):
                    time.sleep(0.01)
                time.sleep(0.005)
        finally:
            stop_trace()
        trace.write(tmp_path / f"rank-{rank}.json")
    return tmp_path


def test_spans_nest_and_have_their_length(folder: Path) -> None:
    events = json.loads((folder / "rank-1.json").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    inner, outer = spans["inner"], spans["outer"]
    assert inner["dur"] >= 10_000
    assert outer["dur"] >= inner["dur"] + 5_000
    assert outer["ts"] <= inner["ts"]
    assert {event["pid"] for event in events} == {1}
    assert list(folder.glob("*.tmp")) == []


def test_nothing_is_recorded_without_a_trace() -> None:
    trace = start_trace(0)
    stop_trace()
    with span("unseen"):
        pass
    assert trace.events == []


def test_the_picture_has_a_lane_a_rank_and_the_shares_add_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_trace.py", str(folder)])
    assert plot_trace.main() == 0
    assert (folder / "trace.png").stat().st_size > 5_000
    assert "rank 0: inner" in capsys.readouterr().out
    shares = plot_trace.shares(plot_trace.read_traces(folder))
    assert set(shares) == {0, 1}
    assert all(0 < kinds["inner"] < kinds["outer"] <= 1 for kinds in shares.values())


def test_a_folder_without_traces_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.trace=true"):
        plot_trace.read_traces(tmp_path)
