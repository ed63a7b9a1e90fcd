"""Journals into a real store: once, in any number of attempts, whatever it refuses."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from ttt_megatron.errors import UserError
from ttt_megatron.tracking import journal
from ttt_megatron.tracking.journal import metrics_record
from ttt_megatron.tracking.state import TRACKING_FILE, read_state, write_state
from ttt_megatron.tracking.uploader import TrackingState


def _history(run, run_id, name="loss"):
    return [(m.step, m.value) for m in run.client.get_metric_history(run_id, name)]


def _steps(first, last):
    return [metrics_record({"loss": step / 8}, step, 1000 + step) for step in range(first, last)]


def test_what_is_sent_twice_is_there_once(make_run):
    run = make_run("twice")
    run.append(
        {"kind": journal.PARAMETERS, "values": {"optimizer.lr": "0.1"}},
        {"kind": journal.TEXT, "path": "run.yaml", "text": "name: twice"},
        *_steps(1, 4),
        {"kind": journal.TAGS, "values": {"host": "here"}},
        {"kind": journal.STATUS, "status": "FINISHED", "time": 5000},
    )
    first = run.upload()
    state = read_state(run.folder)
    # As after a kill between the store's answer and the note of it, at every place.
    (run.folder / TRACKING_FILE).unlink()
    assert run.upload() == first
    for sent in range(0, state.sent, 97):
        line = (run.folder / journal.JOURNAL_FILE).read_bytes().rfind(b"\n", 0, sent) + 1
        write_state(run.folder, TrackingState(uri=run.uri, run_id=first, sent=line))
        assert run.upload() == first
    (found,) = run.runs()
    assert _history(run, first) == [(1, 1 / 8), (2, 2 / 8), (3, 3 / 8)]
    assert found.data.params == {"optimizer.lr": "0.1"}
    assert found.data.tags["host"] == "here"
    assert (found.info.status, found.info.end_time) == ("FINISHED", 5000)
    assert [a.path for a in run.client.list_artifacts(first)] == ["run.yaml"]
    assert run.uploader.left().records == 0


def test_it_goes_on_where_it_ended(make_run):
    run = make_run("on")
    run.append(*_steps(1, 3))
    left = run.uploader.left()
    assert (left.records, left.steps) == (3, (1, 2))
    assert str(left) == "3 records, of steps 1 to 2"
    first = run.upload()
    run.append(*_steps(3, 5))
    assert run.uploader.left().steps == (3, 4)
    assert run.upload() == first
    assert [step for step, _ in _history(run, first)] == [1, 2, 3, 4]


def test_a_run_that_was_deleted_begins_anew(make_run, caplog):
    run = make_run("deleted")
    run.append(*_steps(1, 3))
    first = run.upload()
    run.client.delete_run(first)
    run.append(*_steps(3, 4))
    second = run.upload()
    assert second != first
    assert f"MLflow run {first} is gone" in caplog.text
    assert [step for step, _ in _history(run, second)] == [1, 2, 3]


def test_what_the_store_never_takes_is_told_and_holds_nothing_up(make_run, caplog):
    run = make_run("refused")
    run.append(
        {"kind": journal.PARAMETERS, "values": {"lr": "1", "seed": "2"}},
        {"kind": journal.PARAMETERS, "values": {"lr": "3", "late": "4"}},
        metrics_record({"loss": 1.0, "no | name": 1.0}, 1, 1),
        *_steps(2, 3),
    )
    first = run.upload()
    assert [step for step, _ in _history(run, first)] == [1, 2]
    assert run.client.get_run(first).data.params == {"lr": "1", "seed": "2", "late": "4"}
    assert "refuses metric no | name" in caplog.text
    assert "refuses param lr" in caplog.text
    assert run.uploader.left().records == 0


def test_artifacts_that_cannot_be_stored_are_tried_again(make_run, caplog):
    run = make_run("artifacts")
    run.append(*_steps(1, 2))
    first = run.upload()
    place = Path(run.client.get_run(first).info.artifact_uri.removeprefix("file://"))
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("no folder")
    (run.folder / "loss.png").write_bytes(b"a picture")
    run.append({"kind": journal.ARTIFACT, "file": "loss.png"}, *_steps(2, 3))
    run.upload()
    assert "did not take the artifact loss.png" in caplog.text
    assert [step for step, _ in _history(run, first)] == [1, 2]
    assert run.uploader.left().records == 1
    place.unlink()
    run.upload()
    assert run.uploader.left().records == 0
    assert [a.path for a in run.client.list_artifacts(first)] == ["loss.png"]


def test_another_store_gets_everything(make_run, tmp_path):
    run = make_run("moved")
    run.append(*_steps(1, 3))
    first = run.upload()
    # The same database by another name, as after a change of MLFLOW_TRACKING_URI.
    other = tmp_path / "elsewhere" / "mlflow.db"
    other.parent.mkdir()
    shutil.copy(run.uri.removeprefix("sqlite:///"), other)
    run.uri = f"sqlite:///{other}"
    run.client.delete_run(first)
    second = run.upload()
    assert [step for step, _ in _history(run, second)] == [1, 2]
    assert read_state(run.folder).uri == run.uri


def test_one_process_uploads_at_a_time(make_run):
    run = make_run("alone")
    holder = run.uploader
    holder.upload_piece()
    with pytest.raises(UserError, match="another process, perhaps its training, uploads"):
        run.uploader.upload_deferred()
    holder.close()
    run.upload()


def test_a_state_of_before_has_no_journal(tmp_path):
    (tmp_path / TRACKING_FILE).write_text(json.dumps({"uri": "file:x", "run_id": "1"}))
    assert read_state(tmp_path).sent is None
    (tmp_path / TRACKING_FILE).write_text("[]")
    assert read_state(tmp_path) is None


@pytest.fixture(autouse=True)
def _told(caplog):
    """Tests before may have set levels."""
    caplog.set_level(logging.WARNING, "ttt_megatron")
