"""Whose layout a recipe gets on so many GPUs: its own, the file's, or the plan's."""

from pathlib import Path

import pytest

from ttt_megatron.config import load_recipe
from ttt_megatron.errors import UserError
from ttt_megatron.planning.choice import choose_layout
from ttt_megatron.planning.hardware import find_hardware
from ttt_megatron.planning.laid_out import lay_out

SIZE = Path(__file__).parents[2] / "recipes" / "125m"
RECIPE = SIZE / "pretrain-e2e-8k.yaml"
H100 = find_hardware("h100")


def test_what_a_recipe_or_override_says_stands_and_replicas_fill_the_gpus():
    found = lay_out(RECIPE, ["parallel.tensor=2", "optimizer.lr=1e-4"], 16, H100)
    parallel = found.config.parallel
    assert (found.source, parallel.tensor, parallel.data) == ("the recipe", 2, 8)
    assert found.config.optimizer.lr == 1e-4
    # Named, it is left alone, whatever the number of GPUs.
    assert lay_out(RECIPE, ["parallel.data=4"], 16, H100).config.parallel.world_size == 4


def test_the_file_beside_a_recipe_comes_next():
    found = lay_out(RECIPE, ["optimizer.lr=1e-4"], 32, H100)
    assert found.source == str(SIZE / "layouts.yaml")
    assert found.config.parallel.world_size == 32
    assert found.config == load_recipe(RECIPE, found.settings)
    assert found.config.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("overrides", "gpus", "gpu"),
    [
        (["data.sequence_length=16384"], 8, "h100"),
        (["training.micro_batch_size=4"], 8, "h100"),
        ([], 16, "h100"),
        ([], 8, "h200"),
        (["training.precision=fp32"], 8, "h100"),
    ],
)
def test_the_plan_chooses_where_the_file_is_not_of_this_run(overrides, gpus, gpu):
    found = lay_out(RECIPE, overrides, gpus, find_hardware(gpu))
    assert found.source == "the plan"
    assert found.config.parallel.world_size == gpus
    # What was given stands, whatever the plan takes.
    assert found.config == load_recipe(RECIPE, [*found.settings, *overrides])


def test_the_files_reason_is_told_where_nothing_fits():
    with pytest.raises(UserError, match=r"extend-mamba2-128k\.yaml: no layout divides 128 GPUs"):
        lay_out(SIZE / "extend-mamba2-128k.yaml", [], 128, H100)


def test_recurrent_mixers_are_laid_out_in_what_they_can_take():
    config = load_recipe(SIZE / "pretrain-mamba2-8k.yaml")
    choice = choose_layout(config, H100, 128)
    parallel = choice.config.parallel
    assert (parallel.tensor, parallel.context, parallel.world_size) == (1, 1, 128)
    assert choice.config.model == config.model
    assert "mamba2,attention is not planned" in (choice.note or "")
    hybrid = choose_layout(load_recipe(SIZE / "pretrain-hybrid-8k.yaml"), H100, 128).config
    assert (hybrid.parallel.tensor > 1, hybrid.parallel.context) == (True, 1)
    known = choose_layout(load_recipe(RECIPE), H100, 8)
    assert known.note is None
