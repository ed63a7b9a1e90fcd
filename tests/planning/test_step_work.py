"""FLOPs of the cost model against products counted while the real step runs."""

from pathlib import Path

import pytest
import torch
from count_flops import count_flops

from ttt_kernels.swa_attention.tiles import tile_rows
from ttt_megatron.config import from_dict, load_recipe
from ttt_megatron.config.schema import (
    DataConfig,
    InnerConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from ttt_megatron.meta.learner import Learner
from ttt_megatron.planning.layout import Layout
from ttt_megatron.planning.rank_memory import rank_memory
from ttt_megatron.planning.step_work import step_work
from ttt_megatron.planning.units import mean_keys

RECIPE = Path(__file__).parents[2] / "recipes" / "3b" / "extend-e2e-32k.yaml"
SHAPE = {
    "vocab_size": 512,
    "num_layers": 5,
    "num_suffix_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "ffn_hidden_size": 96,
    "prime_ffn_hidden_size": 80,
    "window_size": 64,
}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"memory_policy": "save_activations"},
        {"memory_policy": "save_all"},
        {"two_level": True},
        {"mode": "first_order"},
        {"mode": "off"},
        {"recompute_prefix": True},
        {"mode": "off", "recompute_prefix": True},
        {"num_suffix_layers": 3, "batch": 2, "num_kv_heads": 2},
        {"num_suffix_layers": 1, "tie_embeddings": False},
    ],
    ids=str,
)
def test_flops_are_those_counted_in_a_step(case):
    case = dict(case)
    batch, recompute = case.pop("batch", 1), case.pop("recompute_prefix", False)
    inner_keys = ("memory_policy", "two_level", "mode")
    inner = InnerConfig(chunk_size=32, **{k: case.pop(k) for k in inner_keys if k in case})
    model = ModelConfig(**SHAPE | case)
    config = RunConfig(
        model=model,
        inner=inner,
        data=DataConfig(sequence_length=256),
        training=TrainingConfig(micro_batch_size=batch, recompute_prefix=recompute),
    )
    learner = Learner(model, inner, recompute_prefix=recompute)
    rows = torch.randint(512, (batch, 257))
    mask = torch.ones(batch, 256, dtype=torch.bool)
    counted = count_flops(lambda: learner(rows[:, :-1], rows[:, 1:], mask).loss.backward())
    work = step_work(config, tile=tile_rows(model.window_size), keep_scores=True)
    assert work.total.flops * batch == pytest.approx(counted, rel=2e-3)


def test_visited_keys():
    for length, window in ((12, 3), (12, 12), (12, None)):
        seen = sum(min(p + 1, window or length) for p in range(length)) / length
        assert mean_keys(length, window) == seen
        assert mean_keys(length, window, 4) >= seen
    assert mean_keys(8, None, 8) == 8


def test_published_shares_of_the_3b_model_at_128k():
    config = load_recipe(RECIPE, ["data.sequence_length=131072"])
    phases = {name: work.flops for name, work in step_work(config).phases.items()}
    total = sum(phases.values())
    prefix_backward = phases["prefix_backward"] + phases["prefix_weights"]
    suffix_backward = sum(phases[k] for k in ("recompute", "suffix_backward", "suffix_weights"))
    assert phases["prefix_forward"] / total == pytest.approx(0.125, abs=0.003)
    assert prefix_backward / total == pytest.approx(0.274, abs=0.003)
    assert phases["suffix_forward"] / total == pytest.approx(0.160, abs=0.003)
    assert suffix_backward / total == pytest.approx(0.440, abs=0.003)


@pytest.mark.parametrize("mixers", ["full", "attention,full", "attention,mamba2"])
def test_models_that_would_be_counted_as_others_are_refused(mixers):
    config = from_dict({"model.mixers": mixers, "model.num_suffix_layers": 0, "inner.mode": "off"})
    with pytest.raises(ValueError, match=rf"plans know no model\.mixers = {mixers}"):
        step_work(config)
    with pytest.raises(ValueError, match=rf"plans know no model\.mixers = {mixers}"):
        rank_memory(config, Layout())
