"""The demo compares like with like: the control has the model's size and reads the same tokens."""

from dataclasses import replace
from pathlib import Path

import pytest

from ttt_megatron.config import load_recipe
from ttt_megatron.model.parameters import count_parameters

RECIPES = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_control_has_the_same_matrices_and_reads_the_same_rows(stage):
    ours = load_recipe(RECIPES / f"{stage}.yaml", ["model.vocab_size=1024"])
    control = load_recipe(RECIPES / f"control-{stage}.yaml", ["model.vocab_size=1024"])
    counts, control_counts = count_parameters(ours.model), count_parameters(control.model)
    assert counts.prime > 0
    assert control_counts.prime == 0
    assert counts.blocks + counts.prime == control_counts.blocks
    assert control.inner.mode == "off"
    assert ours.data == control.data
    assert ours.optimizer == control.optimizer
    same = {"init_from": None, "output": ""}
    assert replace(ours.training, **same) == replace(control.training, **same)


def test_stage_2_is_16_times_longer_and_starts_from_its_own_stage_1():
    for prefix in ("", "control-"):
        first = load_recipe(RECIPES / f"{prefix}stage1.yaml")
        second = load_recipe(RECIPES / f"{prefix}stage2.yaml")
        assert second.data.sequence_length == 16 * first.data.sequence_length
        assert second.training.init_from == first.training.output
        assert first.model == second.model
