"""The published recipes: sizes and tokens of the paper, and layouts that can be trained and fit."""

from functools import cache
from pathlib import Path

import pytest

from ttt_megatron.config import load_recipe
from ttt_megatron.config.layouts import LAYOUTS_FILE, read_layouts, shapes_of
from ttt_megatron.model.parameters import count_parameters
from ttt_megatron.planning.estimate import Estimator
from ttt_megatron.planning.hardware import GIB, find_hardware
from ttt_megatron.planning.layout import recipe_layout
from ttt_megatron.planning.mixers import knows_mixers

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = ("125m", "350m", "760m", "1b", "3b", "8b")
SYSTEMS = 11
# arXiv 2512.23675: parameters of the shape, then learning rate, batch in tokens and tokens of
# pre-training and of extension. 8b is this project's.
PAPER = {
    "125m": (0.184e9, (3e-3, 0.5, 2.5e9), (4e-4, 1, 125e6)),
    "350m": (0.444e9, (1.5e-3, 0.5, 7e9), (4e-4, 1, 350e6)),
    "760m": (0.884e9, (1.25e-3, 0.5, 15e9), (4e-4, 1, 750e6)),
    "1b": (1.468e9, (1e-3, 0.5, 26e9), (4e-4, 1, 1.3e9)),
    "3b": (2.898e9, (8e-4, 1, 54e9), (4e-4, 2, 2.7e9)),
    "8b": (7.896e9, (6e-4, 2, 158e9), (4e-4, 4, 7.9e9)),
}
LENGTHS = {"pretrain": [8192], "extend": [32768, 131072]}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_rates_and_tokens_are_the_papers(size):
    parameters, *stages = PAPER[size]
    for stage, (rate, batch, tokens) in zip(LENGTHS, stages, strict=True):
        for length in LENGTHS[stage]:
            config = load_recipe(RECIPES / size / f"{stage}-e2e-{length // 1024}k.yaml")
            assert count_parameters(config.model).total == pytest.approx(parameters, abs=0.5e6)
            assert config.optimizer.lr == rate
            assert config.data.sequence_length == length
            a_step = config.training.global_batch_size * length
            assert a_step == batch * 2**20
            # The official runs read up to 1% more, the others a step's at most.
            assert tokens <= config.training.steps * a_step <= max(1.01 * tokens, tokens + a_step)
            inner = config.inner
            warms = stage == "pretrain"
            assert (inner.lr_start, inner.lr_warmup_fraction) == ((0.1, 0.1) if warms else (1, 0))
            start = None if warms else f"runs/{size}-pretrain-e2e-8k"
            assert config.training.init_from == start


@cache
def layouts(size):
    return read_layouts(RECIPES / size / LAYOUTS_FILE)


@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_has_a_layout_or_a_reason(size):
    found = layouts(size)
    names = {path.stem for path in (RECIPES / size).glob("*-*-*k.yaml")}
    assert len(names) == SYSTEMS * 3
    assert found.gpu == "h100"
    assert found.shapes == {
        name: shapes_of(load_recipe(RECIPES / size / f"{name}.yaml")) for name in names
    }, "recipes were changed since: run tools/choose_layouts.py"
    assert set(found.layouts) == {
        (name, gpus, precision)
        for name in names
        for gpus in (8, 32, 128)
        for precision in ("bf16", "fp8")
    }
    for one in found.layouts.values():
        assert one.unfit is None or "layout" in one.unfit


@pytest.mark.parametrize("size", SIZES)
def test_layouts_fill_the_gpus_divide_the_batch_and_fit(size):
    hardware = find_hardware("h100")
    planned = 0
    for (name, gpus, precision), one in layouts(size).layouts.items():
        if one.unfit is not None:
            continue
        path = RECIPES / size / f"{name}.yaml"
        config = load_recipe(path, [f"training.precision={precision}", *one.overrides])
        assert config.parallel.world_size == gpus
        held = config.parallel.data * config.training.micro_batch_size
        assert config.training.global_batch_size % held == 0
        assert (one.note is None) == knows_mixers(config.model)
        if one.note is not None:
            continue
        layout = recipe_layout(config)
        assert layout.schedule == one.schedule
        estimator = Estimator(config, layout, hardware)
        result = estimator.run(layout.schedule)
        assert result.fits
        assert result.memory_bytes / GIB == pytest.approx(one.memory_gib, abs=0.006)
        seconds = result.seconds + sum(estimator.outside(estimator.cut()).values())
        assert seconds == pytest.approx(one.step_seconds, rel=1e-3)
        planned += 1
    assert planned > 80
