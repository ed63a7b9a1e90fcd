"""Plans of runs whose static linear maps are in float8, against real steps."""

import argparse
from pathlib import Path

import measure_meta_memory
import pytest
import torch
from count_flops import CountFlops
from measure_meta_memory import measure

from ttt_kernels import CurrentScaling
from ttt_kernels.swa_attention.tiles import tile_rows
from ttt_megatron.config import load_recipe
from ttt_megatron.config.schema import (
    DataConfig,
    Float8Config,
    InnerConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.float8 import Float8Product, float8_layers
from ttt_megatron.planning.estimate import Estimator
from ttt_megatron.planning.hardware import NAMED
from ttt_megatron.planning.layout import Layout, grids, problem
from ttt_megatron.planning.memory import stage_memory
from ttt_megatron.planning.report import heading, tables
from ttt_megatron.planning.search import make_plan
from ttt_megatron.planning.step_work import step_work

RECIPE = Path(__file__).parents[2] / "recipes" / "760m" / "pretrain-e2e-8k.yaml"
MODEL = {
    "vocab_size": 512,
    "num_layers": 5,
    "num_suffix_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 96,
    "window_size": 64,
}


def planned(model: ModelConfig, inner: InnerConfig, length: int, **training: object) -> RunConfig:
    """A run of one sequence at a time, float32 beside float8."""
    return RunConfig(
        model=model,
        inner=inner,
        data=DataConfig(sequence_length=length),
        training=TrainingConfig(micro_batch_size=1, precision="fp8", **training),  # type: ignore[arg-type]
        fp8=Float8Config(compute="fp32"),
    )


def in_float8(layer: torch.nn.Module) -> Float8Product:
    return Float8Product(CurrentScaling())


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"memory_policy": "save_activations"},
        {"memory_policy": "save_all", "two_level": True},
        {"mode": "first_order"},
        {"mode": "off", "recompute_prefix": True},
    ],
    ids=str,
)
def test_flops_in_float8_are_those_counted_in_a_step(case):
    again = case.get("recompute_prefix", False)
    inner = InnerConfig(chunk_size=32, **{k: v for k, v in case.items() if k != "recompute_prefix"})
    config = planned(ModelConfig(**MODEL), inner, 256, recompute_prefix=again)
    learner = Learner(config.model, inner, recompute_prefix=again, float8=in_float8)
    rows = torch.randint(512, (1, 257))
    with CountFlops() as counted:
        mask = torch.ones(1, 256, dtype=torch.bool)
        learner(rows[:, :-1], rows[:, 1:], mask).loss.backward()
    work = step_work(config, tile=tile_rows(config.model.window_size), keep_scores=True).total
    assert work.float8 == counted.float8
    assert work.flops == pytest.approx(counted.total, rel=2e-3)


def test_memory_is_that_measured_in_a_step(monkeypatch):
    learners = []

    def build(shape: argparse.Namespace, two_level: bool) -> Learner:
        learners.append(Learner(model, inner, float8=in_float8))
        for layer in float8_layers(learners[0].model).values():
            layer.float8.begin_pass(layer.weight)
        return learners[0]

    model = ModelConfig(**MODEL | {"hidden_size": 128, "num_kv_heads": None})
    inner = InnerConfig(chunk_size=64)
    monkeypatch.setattr(measure_meta_memory, "build", build)
    shape = argparse.Namespace(vocabulary=512, batch=1, chunk=64)
    found = measure(shape, 4, False)
    config = planned(model, inner, 256)
    kinds = stage_memory(config, Layout(), 0, 3).at(1)
    layers = float8_layers(learners[0].model).values()
    rounded = [layer.float8.rounded(layer.weight) for layer in layers]
    copies = sum(one.forward.data.nbytes + one.backward.data.nbytes for one in rounded)
    assert kinds["weights in float8"] == copies
    assert kinds["weights in compute dtype"] == 0
    for kind in ("fast-weight history", "keys and values", "prefix output"):
        assert kinds[kind] == found[kind.removeprefix("fast-weight ")]
    # Rounding the weights writes to their copies, which are counted with what comes to be then.
    activations = found["prefix activations"] - copies
    assert kinds["prefix activations"] == pytest.approx(activations, rel=0.05)
    scores = 2 * 4 * 64 * (64 + 64 - 1) * 4
    chunk = kinds["suffix activations"] + kinds["fast weights in use"] / 2 + scores
    assert chunk == pytest.approx(found["suffix activations"], rel=0.15)


def test_only_static_maps_are_faster_and_only_their_inputs_smaller():
    plans = {p: load_recipe(RECIPE, [f"training.precision={p}"]) for p in ("bf16", "fp8")}
    work = {name: step_work(config).total for name, config in plans.items()}
    assert work["bf16"].float8 == 0 < work["fp8"].float8
    assert work["fp8"].flops == work["bf16"].flops
    assert work["fp8"].traffic > work["bf16"].traffic
    seconds = {
        name: Estimator(config, Layout(data=8), NAMED["h100"]).estimate().step_seconds
        for name, config in plans.items()
    }
    products = work["fp8"].float8 * plans["fp8"].training.global_batch_size / 8
    spared = products / (NAMED["h100"].flops("fp8") * NAMED["h100"].matmul_efficiency)
    assert 0.3 * spared < seconds["bf16"] - seconds["fp8"] < spared
    kinds = {n: stage_memory(c, Layout(), 0, 18).at(1) for n, c in plans.items()}
    assert kinds["fp8"]["weights in float8"] > 0 == kinds["bf16"]["weights in float8"]
    for kind in ("keys and values", "prefix output", "fast weights in use", "fast-weight history"):
        assert kinds["fp8"][kind] == kinds["bf16"][kind]
    for kind in ("prefix activations", "weights in compute dtype", "suffix activations"):
        assert kinds["fp8"][kind] < kinds["bf16"][kind]


def test_scales_by_row_take_another_pass():
    by_tensor, by_row = (
        load_recipe(RECIPE, ["training.precision=fp8", f"fp8.scaling={scaling}"])
        for scaling in ("tensor", "row")
    )
    assert step_work(by_row).total.traffic > step_work(by_tensor).total.traffic


def test_a_plan_tells_of_float8():
    plan = make_plan(load_recipe(RECIPE, ["training.precision=fp8"]), NAMED["h200"], 1, top=1)
    assert "989 TFLOP/s (1979 in float8)" in heading(plan)
    text = "\n".join(map(str, tables(plan)))
    assert "weights in float8 " in text
    assert "s, weights to float8 " in text


def test_what_float8_cannot_run_on_is_refused():
    config = load_recipe(RECIPE, ["training.precision=fp8"])
    with pytest.raises(UserError, match=r"a100-80 has no products in float8.*bf16"):
        make_plan(config, NAMED["a100-80"])
    # 8 parts of 368 are 46 each, which bf16 takes.
    narrow = ["model.ffn_hidden_size=368", "model.num_heads=16", "model.vocab_size=512"]
    allowed = {}
    for precision in ("bf16", "fp8"):
        config = load_recipe(RECIPE, [f"training.precision={precision}", *narrow])
        allowed[precision] = {layout.tensor for layout in grids(config, 8, 8)}
    assert 8 in allowed["bf16"]
    assert allowed["fp8"] == {1}
    assert "multiples of 16" in str(problem(config, Layout(tensor=8), 8))
