"""Bytes of the memory model against tensors counted while the real step runs."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from measure_meta_memory import measure

from ttt_megatron.config import load_recipe
from ttt_megatron.config.schema import (
    DataConfig,
    InnerConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from ttt_megatron.model.parameters import count_parameters
from ttt_megatron.planning.layout import Layout
from ttt_megatron.planning.memory import history_copies, stage_memory, stage_parameters

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = argparse.Namespace(
    prefix=3,
    suffix=2,
    width=128,
    heads=4,
    mlp=256,
    vocabulary=512,
    chunk=64,
    window=128,
    batch=1,
    policy="recompute",
)


def planned(shape, chunks, two_level):
    model = ModelConfig(
        vocab_size=shape.vocabulary,
        num_layers=shape.prefix + shape.suffix,
        num_suffix_layers=shape.suffix,
        hidden_size=shape.width,
        num_heads=shape.heads,
        ffn_hidden_size=shape.mlp,
        window_size=shape.window,
    )
    config = RunConfig(
        model=model,
        inner=InnerConfig(chunk_size=shape.chunk, two_level=two_level, memory_policy=shape.policy),
        data=DataConfig(sequence_length=shape.chunk * chunks),
        training=TrainingConfig(micro_batch_size=shape.batch),
    )
    layout = Layout(micro_batch_size=shape.batch)
    return stage_memory(config, layout, 0, shape.prefix).at(1)


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("policy", ["recompute", "save_activations", "save_all"])
def test_memory_is_that_measured_in_a_step(two_level, policy):
    shape = argparse.Namespace(**vars(SHAPE) | {"policy": policy})
    found = measure(shape, 8, two_level)
    kinds = planned(shape, 8, two_level)
    assert kinds["fast-weight history"] == found["history"]
    assert kinds["keys and values"] == found["keys and values"]
    assert kinds["prefix output"] == found["prefix output"]
    assert kinds["prefix activations"] == pytest.approx(found["prefix activations"], rel=0.15)
    kept = kinds["kept by the forward sweep"]
    assert kept == pytest.approx(found["kept per token"], rel=0.1)
    # A chunk on the CPU also holds scores; the direction and the gradient are counted as in use.
    scores = 2 * shape.heads * shape.chunk * (shape.chunk + shape.window - 1) * 4
    chunk = kinds["suffix activations"] + kinds["fast weights in use"] / 2 + scores
    assert chunk == pytest.approx(found["suffix activations"], rel=0.15)
    names = ("fast-weight history", "keys and values", "prefix output", "prefix activations")
    total = sum(kinds[name] for name in names) + kept + chunk
    assert total == pytest.approx(sum(found.values()), rel=0.15)


def test_history_of_two_levels():
    # As measured: copies of the fast weights for 8, 16, 32 and 64 chunks.
    segments = {8: 2, 16: 3, 32: 5, 64: 7}
    copies = [history_copies(chunks - 1, size) for chunks, size in segments.items()]
    assert copies == [4, 7, 10, 15]
    assert history_copies(63, None) == 63


@pytest.mark.parametrize("size", ["125m", "3b"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, {"post_norm": False}, {"qk_norm": False}], ids=str
)
def test_parameters_of_all_processes_are_the_models(size, changes):
    config = load_recipe(RECIPES / size / "base.yaml")
    config = replace(config, model=replace(config.model, **changes))
    counts = count_parameters(config.model)
    blocks = config.model.num_layers - config.model.num_suffix_layers
    assert stage_parameters(config, Layout(), blocks, True, True) == counts.total
    halves = Layout(tensor=2)
    held = stage_parameters(config, halves, blocks, True, True)
    assert 2 * held == counts.total + counts.norms
    stages = Layout(pipeline=2)
    first = stage_parameters(config, stages, blocks - 1, True, False)
    last = stage_parameters(config, stages, 1, False, True)
    copied = counts.embedding if config.model.tie_embeddings else 0
    assert first + last == counts.total + copied


def test_memory_falls_with_every_kind_of_cut():
    config = load_recipe(RECIPES / "3b" / "extend-e2e-32k.yaml", ["data.sequence_length=131072"])

    def kinds(**layout):
        return stage_memory(config, Layout(**layout), 0, 24).at(1)

    whole, tensor, context = kinds(), kinds(tensor=4, sequence_parallel=True), kinds(context=4)
    for kind in ("fast-weight history", "keys and values"):
        assert tensor[kind] == pytest.approx(whole[kind] / 4, rel=0.1)
    assert context["prefix activations"] == whole["prefix activations"] / 4
    assert context["fast-weight history"] == pytest.approx(
        whole["fast-weight history"] / 4, rel=0.02
    )
    assert whole["halo"] == 0 < context["halo"]
    assert kinds(data=8)["optimizer"] == whole["optimizer"] / 8
    apart, shared = kinds(tensor=4)["prefix activations"], tensor["prefix activations"]
    # Gathered inputs of matrices stay whole.
    assert whole["prefix activations"] / 4 < shared < apart < whole["prefix activations"]
