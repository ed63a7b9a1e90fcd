"""What a sweep's file may say, and what is told of one that is wrong."""

from pathlib import Path

import pytest
from sweeps.sweep_files import write_sweep

from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.points import find_points, make_points
from ttt_megatron.sweeps.sweep_file import read_sweep

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def _points(path, overrides=()):
    sweep = read_sweep(path)
    return make_points(sweep, Path(sweep.output), overrides)


def test_the_grid_zipped_axes_named_points_and_seeds(tmp_path):
    path = write_sweep(
        tmp_path,
        tmp_path / "data",
        set={"training": {"steps": 5}},
        axes={"optimizer.lr": [1e-2, 2e-2]},
        zipped=[{"inner.chunk_size": [4, 8], "model.window_size": [8, 16]}],
        points={"plain": {"inner.mode": "off", "model": {"num_suffix_layers": 0}}},
        seeds=[3, 4],
    )
    points = _points(path, ["training.eval_sequences=7"])
    assert [point.index for point in points] == list(range(10))
    assert [point.group for point in points[::2]] == [
        "optimizer.lr-0.01_chunk_size-4",
        "optimizer.lr-0.01_chunk_size-8",
        "optimizer.lr-0.02_chunk_size-4",
        "optimizer.lr-0.02_chunk_size-8",
        "plain",
    ]
    one, plain = points[5], points[8]
    assert one.name == "optimizer.lr-0.02_chunk_size-4_seed-4"
    assert (one.config.optimizer.lr, one.config.inner.chunk_size) == (2e-2, 4)
    assert (one.config.model.window_size, one.config.training.seed) == (8, 4)
    assert (one.config.training.steps, one.config.training.eval_sequences) == (5, 7)
    assert one.folder == tmp_path / "out" / "points" / one.name
    assert plain.named
    assert (plain.config.inner.mode, plain.config.model.num_suffix_layers) == ("off", 0)
    assert plain.config.optimizer.lr == 1e-2
    assert find_points(points, [one.name], None) == [one]
    assert find_points(points, [], 8) == [plain]
    assert find_points(points, [], None) == points


def test_seeds_alone_are_those_of_the_base(tmp_path):
    assert [p.name for p in _points(write_sweep(tmp_path, tmp_path, seeds=[1, 2]))] == [
        "base_seed-1",
        "base_seed-2",
    ]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"axis": {"optimizer.lr": [1]}}, "unknown key axis; the nearest known key is axes"),
        ({"axes": {"model.windw_size": [8]}}, "axes: unknown key model.windw_size; the nearest"),
        ({"axes": {"model.window_size": 8}}, "axes: model.window_size must have a list of values"),
        ({"axes": {"model.window_size": [8.5]}}, "model.window_size must be an integer or null"),
        ({"axes": {"training.output": ["a"]}}, "training.output cannot be set here: every run has"),
        ({"set": {"inner": {"rate": 1}}, "seeds": [1]}, "set: unknown key inner.rate"),
        ({"points": {"a b": {}}}, "the point 'a b' names a folder"),
        ({"points": {"a": {"inner.lrr": 1}}}, "point a: unknown key inner.lrr"),
        ({"seeds": [1], "points": {"a": {"training.seed": 1}}}, "point a sets training.seed"),
        ({"seeds": [1.5]}, "seeds: training.seed must be an integer, not 1.5"),
        ({"measure": {"los": "loss"}, "seeds": [1]}, "measure: unknown key los; the nearest known"),
        ({"measure": {"loss": "accuracy"}, "seeds": [1]}, "loss must be one of validation_loss"),
        ({}, "has no points"),
        (
            {"axes": {"inner.lr": [1]}, "set": {"inner.lr": 2}},
            "inner.lr is varied and also under set",
        ),
        (
            {"axes": {"inner.lr": [1]}, "zipped": [{"inner.lr": [2]}]},
            "inner.lr is varied twice",
        ),
        (
            {"zipped": [{"inner.lr": [1, 2], "inner.clip": [1]}]},
            "need equally many values: inner.lr has 2, inner.clip has 1",
        ),
        ({"base": "no.yaml", "seeds": [1]}, "base names no.yaml, and there is no file"),
        ({"axes": {"inner.lr": [1, 1.0]}}, "two points are called inner.lr-1"),
        ({"set": {"training.eval_sequences": 0}, "seeds": [1]}, "training.eval_sequences = 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, keys, said):
    with pytest.raises(UserError) as caught:
        _points(write_sweep(tmp_path, tmp_path, **keys))
    assert said in str(caught.value)
    assert str(tmp_path / "sweep.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_impossible_points_are_all_named(tmp_path):
    path = write_sweep(tmp_path, tmp_path, axes={"model.window_size": [4, 8, 2]})
    with pytest.raises(UserError) as caught:
        _points(path)
    told = str(caught.value)
    assert "2 of 3 points cannot run: point window_size-4: model.window_size = 4 is less" in told
    assert "; point window_size-2: model.window_size = 2 is less" in told


def test_overrides_and_names_that_do_not_fit(tmp_path):
    path = write_sweep(tmp_path, tmp_path, axes={"inner.lr": [1, 2]})
    for override, said in (
        ("inner.lr=3", "varies this key"),
        ("training.output=x", "cannot be set here"),
        ("inner.lrr=3", "unknown key inner.lrr"),
    ):
        with pytest.raises(UserError, match=said):
            _points(path, [override])
    points = _points(path)
    with pytest.raises(UserError, match=r"no such point; the nearest is inner.lr-2"):
        find_points(points, ["inner.lr2"], None)
    with pytest.raises(UserError, match="the 2 points are 0 to 1"):
        find_points(points, [], 2)


@pytest.mark.parametrize("path", sorted((RECIPES / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_ablations_that_come_along_are_possible(path):
    points = _points(path)
    assert len(points) >= 4
    assert all(point.config.data.path for point in points)
