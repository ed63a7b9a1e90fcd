"""A finished point's numbers are what the sweep asks for on the data that is there."""

import json
import random
import shutil
from pathlib import Path

import pytest
from sweeps.sweep_files import read_points, train, write_sweep

from ttt_megatron.cli.main import main
from ttt_megatron.cli.sweep import with_asked
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.errors import UserError
from ttt_megatron.reporting.document import make_report
from ttt_megatron.reporting.runs import find_subjects
from ttt_megatron.sweeps.job import make_job
from ttt_megatron.sweeps.points import make_points
from ttt_megatron.sweeps.results import read_results
from ttt_megatron.sweeps.state import read_state, resolve_points
from ttt_megatron.sweeps.sweep_file import read_sweep

_ASKED = {"documents": 3, "length": 32}


@pytest.fixture(scope="module")
def trained(trained_run, tmp_path_factory):
    """The folder of a sweep of one trained point. Read only."""
    folder = tmp_path_factory.mktemp("measured")
    _, points, output = read_points(write_sweep(folder, trained_run.data, seeds=[1]))
    train(points)
    return output


@pytest.fixture
def output(trained, tmp_path):
    """A copy of it, where `write_sweep` looks for the points of a file in `tmp_path`."""
    return shutil.copytree(trained, tmp_path / "out")


def _evaluate(output, *words):
    assert main(["evaluate", str(output / "points" / "base_seed-1"), "--batch", "4", *words]) == 0


def _look(tmp_path, data, evaluate):
    """The sweep that asks for this, its point and the point's state."""
    path = write_sweep(tmp_path, data, seeds=[1], measure={"evaluate": evaluate})
    sweep, (point,), _ = read_points(path)
    sweep = with_asked(sweep)
    return sweep, point, read_state(point, sweep)


def _prepare(folder: Path, seed: int) -> None:
    source, generator = folder.with_name(f"text-{seed}"), random.Random(seed)
    source.mkdir()
    for number in range(12):
        words = generator.choices(("field", "plough", "seed", "rain", "barn"), k=60 + number)
        (source / f"{number:02d}.txt").write_text(" ".join(words))
    prepare(PrepareOptions(inputs=(str(source),), output=str(folder), validation=0.5, workers=1))


def test_an_evaluation_counts_if_it_is_the_one_asked_for(output, trained_run, tmp_path, capsys):
    _evaluate(output, "--documents", "3", "--length", "32")
    _, _, state = _look(tmp_path, trained_run.data, _ASKED)
    assert state.finished
    assert {"validation_loss", "evaluated, on"} <= set(state.values)
    for changed in ({**_ASKED, "documents": 2}, {"documents": 3}, {"length": 32}, {}):
        sweep, point, state = _look(tmp_path, trained_run.data, changed)
        assert (state.trained, state.missing) == (True, ("position",))
        assert set(state.values) == {"validation_loss"}
        make_job(point, state, sweep, output)
        assert not (output / "recipes").exists(), "what is trained is not trained again"
    capsys.readouterr()
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--dry-run"]) == 0
    assert "to measure: position" in capsys.readouterr().out
    both = {**_ASKED, "task": ["position", "leakage"]}
    _, _, state = _look(tmp_path, trained_run.data, both)
    assert state.missing == ("leakage",)
    assert "evaluated, on" in state.values


def test_an_evaluation_by_hand_is_not_taken_for_the_sweeps(output, trained_run, tmp_path):
    _evaluate(output, "--documents", "3")
    assert _look(tmp_path, trained_run.data, _ASKED)[2].missing == ("position",)
    _evaluate(output, "--documents", "3", "--length", "32", "--device", "cpu")
    assert _look(tmp_path, trained_run.data, _ASKED)[2].finished
    _evaluate(output, "--documents", "3", "--length", "48", "--output", str(tmp_path / "by-hand"))
    assert _look(tmp_path, trained_run.data, _ASKED)[2].finished


@pytest.mark.slow
def test_the_sweep_evaluates_again_and_does_no_more(output, trained_run, tmp_path):
    _evaluate(output, "--documents", "3", "--length", "32")
    wanted = _look(tmp_path, trained_run.data, _ASKED)[2].values
    _evaluate(output, "--documents", "3", "--length", "48")
    run = output / "points" / "base_seed-1"
    checkpoints = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/**/*")}
    rows = (run / "metrics.jsonl").read_text()
    assert main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    (point,) = read_results(output).points
    assert (point.status, point.values) == ("finished", pytest.approx(wanted))
    assert {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/**/*")} == checkpoints
    assert (run / "metrics.jsonl").read_text() == rows


def test_an_evaluation_that_does_not_say_what_was_asked_is_for_reports_alone(
    output, trained_run, tmp_path
):
    _evaluate(output, "--documents", "3", "--length", "32")
    run = output / "points" / "base_seed-1"
    path = run / "evaluation" / "by_position.json"
    values = json.loads(path.read_text())
    del values["about"]["asked"]
    path.write_text(json.dumps(values))
    assert _look(tmp_path, trained_run.data, _ASKED)[2].missing == ("position",)
    report = make_report(find_subjects([f"run={run}"]), "t", None)
    assert "Loss by position" in [section.title for section in report.sections]


def test_an_evaluation_on_data_prepared_anew_is_made_again(output, trained_run, tmp_path):
    other = tmp_path / "other"
    asked = {**_ASKED, "data": str(other)}
    _prepare(other, 1)
    _evaluate(output, "--documents", "3", "--length", "32", "--data", str(other))
    assert _look(tmp_path, trained_run.data, asked)[2].finished
    assert not _look(tmp_path, trained_run.data, _ASKED)[2].finished
    shutil.rmtree(other)
    _prepare(other, 2)
    assert _look(tmp_path, trained_run.data, asked)[2].missing == ("position",)


def _resolve(path):
    sweep = read_sweep(path)
    return resolve_points(make_points(sweep, Path(sweep.output)), sweep)


def test_a_finished_point_of_other_data_is_refused(output, trained_run, tmp_path):
    shutil.copytree(trained_run.data, tmp_path / "moved")
    assert len(_resolve(write_sweep(tmp_path, tmp_path / "moved", seeds=[1]))) == 1
    _prepare(tmp_path / "other", 1)
    with pytest.raises(UserError, match=r"step-00000003 was trained on other data than \S+other "):
        _resolve(write_sweep(tmp_path, tmp_path / "other", seeds=[1]))


def test_a_validation_loss_over_other_sequences_is_refused(output, trained_run, tmp_path):
    changed = {"training.eval_sequences": 1}
    with pytest.raises(UserError, match=r"training\.eval_sequences is 1 and was 2"):
        _resolve(write_sweep(tmp_path, trained_run.data, seeds=[1], set=changed))
    by_training = {"seeds": [1], "set": changed, "measure": {"loss": "loss"}}
    assert len(_resolve(write_sweep(tmp_path, trained_run.data, **by_training))) == 1
