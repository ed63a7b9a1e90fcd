"""What befell a run, as it is written down."""

from pathlib import Path

import pytest

from ttt_megatron.errors import UserError
from ttt_megatron.resilience.events import (
    EVENTS_FILE,
    Event,
    read_events,
    record_event,
    recording_failure,
)


def test_events_come_back_as_they_were_but_for_a_line_cut_off(tmp_path: Path) -> None:
    events = [Event(kind="started", message="m", step=0), Event(kind="slow", message="é\n", rank=3)]
    for event in events:
        record_event(tmp_path / "run", event)
    with (tmp_path / "run" / EVENTS_FILE).open("a") as file:
        file.write('{"kind": "sk')
    assert read_events(tmp_path / "run") == events
    assert read_events(tmp_path / "none") == []
    record_event(Path("/proc/nothing"), events[0])


def test_a_failure_is_written_down_and_passed_on(tmp_path: Path) -> None:
    with pytest.raises(UserError), recording_failure(tmp_path):
        raise UserError("data.path is empty")
    with pytest.raises(ValueError, match="bug"), recording_failure(tmp_path):
        raise ValueError("bug")
    told = [(event.kind, event.message, event.user) for event in read_events(tmp_path)]
    assert told == [("failed", "data.path is empty", True), ("failed", "ValueError: bug", False)]
