"""Plans of whole runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from ttt_megatron.config import load_recipe
from ttt_megatron.errors import UserError
from ttt_megatron.planning.estimate import CHOSEN, Estimator
from ttt_megatron.planning.hardware import NAMED, find_hardware
from ttt_megatron.planning.layout import Layout, grids, problem, recipe_layout
from ttt_megatron.planning.search import make_plan

RECIPES = Path(__file__).parents[2] / "recipes"
H100 = NAMED["h100"]


def recipe(size="3b", *changes):
    return load_recipe(RECIPES / size / "extend-e2e-32k.yaml", changes)


LONG = ("data.sequence_length=131072", "training.global_batch_size=16")


def test_3b_at_128k_runs_on_128_h100():
    plan = make_plan(recipe("3b", *LONG), H100, 128, top=3)
    assert plan.recipe is None
    assert "16 sequences" in (plan.note or "")
    assert len(plan.best) == 3
    for found in plan.best:
        assert found.layout.gpus == 128
        assert found.fits
        assert found.chosen.memory_bytes <= H100.memory_bytes
        assert found.layout.tensor <= H100.gpus_per_node
        assert found.tokens == 16 * 131072
    seconds = [found.step_seconds for found in plan.best]
    assert seconds[-1] <= 1.5 * seconds[0]
    # No faster than the matrix products at their efficiency.
    best = plan.best[0]
    floor = best.step_flops / (128 * H100.flops("bf16") * H100.matmul_efficiency)
    assert floor < best.step_seconds < 5 * floor


def test_a_small_model_needs_no_model_parallelism():
    plan = make_plan(recipe("125m"), H100, 8, top=2)
    assert plan.best[0].layout.grid == (1, 1, 1, 8)
    assert plan.recipe is not None
    assert plan.recipe.layout.data == 8


def test_more_gpus_and_faster_ones_make_faster_steps():
    config = recipe("350m")
    steps = [make_plan(config, H100, n, top=1).best[0].step_seconds for n in (8, 16, 32)]
    assert steps == sorted(steps, reverse=True)
    layout = Layout(data=8)
    by_gpu = {
        name: Estimator(recipe("125m"), layout, NAMED[name]).estimate().step_seconds
        for name in ("a100-80", "h100", "h200", "b200")
    }
    assert list(by_gpu.values()) == sorted(by_gpu.values(), reverse=True)


def test_memory_policies_buy_time_with_memory():
    config = recipe("350m")
    found = [
        Estimator(config, Layout(data=8, memory_policy=policy), H100).estimate()
        for policy in ("recompute", "save_activations", "save_all")
    ]
    assert [e.step_seconds for e in found] == sorted((e.step_seconds for e in found), reverse=True)
    sizes = [e.chosen.memory_bytes for e in found]
    assert sizes == sorted(sizes)
    twice = Estimator(config, Layout(data=8, two_level=True), H100).estimate()
    assert (
        twice.chosen.memory["fast-weight history"] < found[0].chosen.memory["fast-weight history"]
    )
    assert twice.step_seconds > found[0].step_seconds


def test_every_schedule_of_a_layout_is_simulated():
    config = recipe("3b", *LONG)
    context = Estimator(config, Layout(tensor=8, context=4, data=4, overlap=True), H100).estimate()
    assert set(context.schedules) == {"gpipe", "1f1b", "zigzag"}
    assert context.schedules["zigzag"].bubble < context.schedules["1f1b"].bubble
    assert context.transfers["fast-weight relay"] > 0 == context.transfers["pipeline boundary"]
    pipeline = Estimator(config, Layout(tensor=8, pipeline=2, data=8), H100).estimate()
    assert set(pipeline.schedules) == {"gpipe", "1f1b", "interleaved"}
    assert pipeline.transfers["fast-weight relay"] == 0 < pipeline.transfers["pipeline boundary"]
    assert sum(pipeline.prefix_blocks) == 24
    assert pipeline.prefix_blocks[0] > pipeline.prefix_blocks[1]


def test_a_plans_settings_ask_for_its_layouts():
    plan = make_plan(recipe("3b", *LONG), H100, 64, top=3)
    layouts = [found.layout for found in plan.best]
    pipeline = Layout(tensor=8, pipeline=2, data=4, overlap=True)
    layouts += [pipeline, pipeline.under("interleaved")]
    for layout in layouts:
        asked = recipe_layout(recipe("3b", *LONG, *layout.overrides()))
        assert asked == layout
    schedules = {found.layout.schedule for found in plan.best}
    assert schedules == {found.schedule for found in plan.best} <= set(CHOSEN)


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        (("context=2",), "1f1b"),
        (("context=2", "context_order=zigzag"), "zigzag"),
        (("pipeline=2",), "1f1b"),
        (("pipeline=2", "virtual_pipeline=3"), "interleaved"),
        ((), "in turn"),
    ],
)
def test_the_recipes_own_schedule_is_planned(settings, schedule):
    changes = [f"parallel.{setting}" for setting in settings]
    changes += ["training.global_batch_size=32", "training.micro_batch_size=1"]
    found = make_plan(recipe("125m", *changes), H100, top=1).recipe
    assert found is not None
    assert found.schedule == found.layout.schedule == schedule
    assert found.layout.virtual_pipeline == (3 if schedule == "interleaved" else 1)
    # The others are simulated all the same.
    assert len(found.schedules) == {"in turn": 1, "interleaved": 3}.get(schedule, 3)


def test_long_steps_are_extended_not_simulated():
    config = recipe("125m", "training.global_batch_size=256")
    estimator = Estimator(config, Layout(context=2), H100)
    extended = estimator.run("1f1b")
    whole = estimator.timeline("1f1b")
    assert extended.seconds == pytest.approx(whole.seconds, rel=0.01)


def test_shapes_forbid_what_does_not_divide():
    config = recipe("3b")
    assert "num_heads" in (problem(config, Layout(tensor=3), 8) or "")
    assert "chunks" in (problem(config, Layout(context=3), 8) or "")
    assert "node" in (problem(config, Layout(tensor=16), 8) or "")
    assert "batch" in (problem(config, Layout(data=5), 8) or "")
    assert "stages" in (problem(config, Layout(pipeline=64), 8) or "")
    assert problem(config, Layout(tensor=8, context=4, pipeline=2, data=4), 8) is None
    assert all(layout.gpus == 64 for layout in grids(config, 64, 8))


def test_impossible_asks_are_one_sentence():
    with pytest.raises(UserError, match=r"no layout of 1 x h100 fits: the leanest, one process"):
        make_plan(recipe("3b", *LONG), H100, 1)
    with pytest.raises(UserError, match="no layout divides 37 GPUs"):
        make_plan(recipe("3b"), H100, 37)
    unknown = recipe("3b")
    unknown = replace(unknown, model=replace(unknown.model, vocab_size=None))
    with pytest.raises(UserError, match="vocab_size"):
        make_plan(unknown, H100, 8)


def test_hardware_can_be_changed():
    changed = find_hardware("H100", ["memory_gib=40", "gpus_per_node=4"])
    assert changed.memory_gib == 40
    assert changed.gpus_per_node == 4
    assert changed.memory_bytes < H100.memory_bytes
    for name, changes, message in (
        ("h1000", [], "known GPUs are h100"),
        ("h100", ["memory=40"], "did you mean memory_gib"),
        ("h100", ["memory_gib=many"], "must be a number"),
        ("h100", ["network_gbs=0"], "must be a number above 0"),
    ):
        with pytest.raises(UserError, match=message):
            find_hardware(name, changes)
