"""Points' states from folders, processes that fail or finish, tables, plot and MLflow."""

import csv
import io
import json
import math
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
from sweeps.sweep_files import read_points, train, write_sweep

from ttt_megatron.cli.main import main
from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.job import make_job
from ttt_megatron.sweeps.points import make_points
from ttt_megatron.sweeps.results import collect, read_results
from ttt_megatron.sweeps.run import read_states
from ttt_megatron.sweeps.state import read_state, resolve_points
from ttt_megatron.sweeps.sweep_file import read_sweep
from ttt_megatron.sweeps.tables import as_csv, write_results
from ttt_megatron.sweeps.tracking import track_points
from ttt_megatron.tracking.state import read_tracking
from ttt_megatron.training.metrics_file import METRICS_FILE


@pytest.fixture(scope="module")
def swept(trained_run, tmp_path_factory):
    """A sweep of two windows and a control with two seeds each, trained. Read only."""
    folder = tmp_path_factory.mktemp("swept")
    path = write_sweep(
        folder,
        trained_run.data,
        axes={"model.window_size": [8, 16]},
        points={"off": {"inner.mode": "off"}},
        seeds=[1, 2],
    )
    _, points, _ = read_points(path)
    train(points)
    return path


def test_a_point_is_as_far_as_its_folder_says(swept, tmp_path):
    sweep, points, _ = read_points(swept)
    folder = tmp_path / "moved"
    shutil.copytree(points[0].folder.parents[1], folder)
    text = swept.read_text().replace(str(swept.parent / "out"), str(folder))
    (tmp_path / "sweep.yaml").write_text(text)
    shutil.copy(swept.parent / "base.yaml", tmp_path)
    sweep, (point, *_), _ = read_points(tmp_path / "sweep.yaml")
    state = read_state(point, sweep)
    assert (state.step, state.finished) == (3, True)
    assert 0 < state.values["validation_loss"] < 10
    log = point.folder / METRICS_FILE
    kept = [line for line in log.read_text().splitlines() if "validation_loss" not in line]
    log.write_text("\n".join(kept) + "\n")
    state = read_state(point, sweep)
    assert (state.trained, state.finished, state.missing) == (True, False, ("validation_loss",))
    # Training a finished run is the evaluation at its end, no step more.
    train([point])
    again = read_state(point, sweep)
    assert again.finished
    # A checkpoint with a changed byte does not count, whatever else the folder says.
    shard = max((point.folder / "checkpoints" / "step-00000003").rglob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    state = read_state(point, sweep)
    assert (state.step, state.finished, state.values) == (2, False, {})
    train([point])
    assert read_state(point, sweep).values == again.values


def test_tables_plot_and_their_way_back(swept, tmp_path):
    sweep, points, output = read_points(swept)
    states = read_states(points, sweep)
    results = collect(sweep, points, states, {}, output)
    files = write_results(results, tmp_path)
    assert [path.name for path in files] == ["sweep.json", "sweep.md", "sweep.csv", "sweep.png"]
    assert read_results(tmp_path) == results
    losses = [states[f"window_size-8_seed-{seed}"].values["validation_loss"] for seed in (1, 2)]
    mean = results.mean("window_size-8", "validation_loss")
    assert mean.mean == pytest.approx(sum(losses) / 2)
    # Of two values the standard error of the mean is half their distance.
    assert mean.standard_error == pytest.approx(abs(losses[0] - losses[1]) / 2)
    assert mean.seeds == 2
    cell = f"{mean.mean:.3f} ± {mean.standard_error:.3f}"
    line = next(x for x in files[1].read_text().splitlines() if x.startswith("| window_size-8 |"))
    assert cell in line
    rows = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert [row["point"] for row in rows] == [point.name for point in points]
    assert float(rows[0]["validation_loss"]) == losses[0]
    assert (rows[0]["model.window_size"], rows[4]["inner.mode"]) == ("8", "off")
    assert rows[0]["tokens"] == str(3 * 2 * 64)
    assert files[3].read_bytes().startswith(b"\x89PNG")
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="is no result of `ttt-megatron sweep`"):
        read_results(tmp_path)


def test_points_that_cannot_start_are_named_before_any_runs(swept, trained_run, tmp_path):
    path = write_sweep(tmp_path, trained_run.data, axes={"data.sequence_length": [64, 1 << 20]})
    with pytest.raises(UserError) as caught:
        resolve_points(read_unresolved(path), read_sweep(path))
    assert "1 of 2 points cannot run: point sequence_length-1048576: " in str(caught.value)
    # What was trained with other settings is not taken for the point.
    other = swept.parent / "other.yaml"
    other.write_text(swept.read_text() + "set:\n  optimizer.lr: 0.5\n")
    with pytest.raises(UserError) as caught:
        resolve_points(read_unresolved(other), read_sweep(other))
    assert "optimizer.lr is 0.5 and was 0.01" in str(caught.value)
    assert "off_seed-2: " in str(caught.value)
    third = write_sweep(tmp_path, tmp_path / "none", axes={"inner.lr": [1, 2]})
    with pytest.raises(UserError, match=r"2 points cannot run: points inner.lr-1, inner.lr-2: "):
        resolve_points(read_unresolved(third), read_sweep(third))


def read_unresolved(path):
    """The points as their file has them."""
    sweep = read_sweep(path)
    return make_points(sweep, Path(sweep.output))


@pytest.mark.slow
def test_a_failed_point_is_told_and_stops_no_other(trained_run, tmp_path, capsys):
    """The others were trained before, so that one process is all it takes."""
    path = write_sweep(
        tmp_path,
        trained_run.data,
        axes={"optimizer.lr": [1e30, 1e-2]},
        set={"training.steps": 12, "optimizer.warmup_fraction": 0.0},
    )
    _, points, output = read_points(path)
    train(points[1:])
    assert main(["sweep", str(path)]) == 1
    told = capsys.readouterr()
    assert "[1/2] optimizer.lr-1e+30 runs" in told.err
    assert "FAILED: optimizer.lr-1e+30, exit status 2; its log ends" in told.err
    assert "lower optimizer.lr" in told.err
    assert re.search(r"lr-1e\+30: failed, step \d+ of 12, exit status 2: ", told.out)
    results = read_results(output)
    assert [point.status for point in results.points] == ["failed", "finished"]
    assert math.isfinite(results.points[1].values["validation_loss"])


def test_runs_of_points_are_children_of_the_sweeps_run(trained_run, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = write_sweep(
        tmp_path,
        trained_run.data,
        axes={"inner.lr": [1, 2]},
        set={"tracking": {"mlflow": True, "experiment": "family"}},
    )
    sweep, points, output = read_points(path)
    points = track_points(points[:1], sweep, output)
    train(points)
    parent = read_tracking(output)
    assert parent["uri"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    # A later call, and a training that is resumed, keep both runs.
    child = read_tracking(points[0].folder)["run_id"]
    shutil.rmtree(points[0].folder / "checkpoints" / "step-00000003")
    again = track_points(points, sweep, output)
    train(again)
    assert read_tracking(output) == parent
    assert read_tracking(again[0].folder)["run_id"] == child
    client = MlflowClient(tracking_uri=parent["uri"])
    family = client.get_experiment_by_name("family").experiment_id
    runs = {run.info.run_id: run for run in client.search_runs([family])}
    assert set(runs) == {parent["run_id"], child}
    assert runs[parent["run_id"]].data.params["inner.lr"] == "1, 2"
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        query = "SELECT value FROM tags WHERE run_uuid = ? AND key = 'mlflow.parentRunId'"
        assert store.execute(query, (child,)).fetchall() == [(parent["run_id"],)]
    # An address from the environment stays there.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", parent["uri"])
    _, untold, _ = read_points(path)
    told = track_points(untold[:1], sweep, output)[0].config.tracking
    assert (told.tracking_uri, told.parent_run) == (None, parent["run_id"])
    job = make_job(again[0], read_state(again[0], sweep), sweep, output)
    assert job.last_lines() == []
    recipe = output / "recipes" / f"{again[0].name}.yaml"
    assert not recipe.exists(), "a finished point needs no training"


def test_json_has_no_nan(swept, tmp_path):
    sweep, points, output = read_points(swept)
    states = {**read_states(points, sweep)}
    first = points[0].name
    state = states[first]
    states[first] = type(state)(
        step=state.step, steps=state.steps, values={"validation_loss": math.nan}
    )
    results = collect(sweep, points, states, {}, output)
    write_results(results, tmp_path)
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert data["points"][0]["values"] == {"validation_loss": None}
    assert data["groups"]["window_size-8"]["validation_loss"]["seeds"] == 1
    assert (
        f"{first}: finished, and its validation_loss is not finite"
        in (tmp_path / "sweep.md").read_text()
    )
