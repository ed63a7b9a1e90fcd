"""Which layout a recipe is submitted with."""

from pathlib import Path

import pytest
from cluster.cluster_case import cpu_profile, write_recipe

from ttt_megatron.cluster.layout import place
from ttt_megatron.cluster.profile import load_profile
from ttt_megatron.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"
H100 = load_profile("default")


def test_without_sizes_the_layout_is_that_of_the_file_beside_the_recipe():
    recipe = RECIPES / "3b" / "extend-e2e-32k.yaml"
    found = place(str(recipe), ["optimizer.lr=1e-3"], 4, H100)
    assert found.origin == f"as {recipe.with_name('layouts.yaml')} has it"
    assert found.config.parallel.world_size == 32
    assert found.config.optimizer.lr == 1e-3


def test_where_the_file_has_none_the_layout_is_planned():
    recipe = str(RECIPES / "3b" / "extend-e2e-32k.yaml")
    found = place(recipe, ["optimizer.lr=1e-3", "training.micro_batch_size=1"], 4, H100)
    assert found.config.parallel.world_size == 32 == found.nodes * found.processes
    assert found.config.parallel.tensor > 1
    assert found.config.optimizer.lr == 1e-3
    assert "plan" in found.origin
    # Of the planned layouts the first that the recipe allows: this one uses CUDA graphs.
    recipe = str(RECIPES / "reproduction-30m" / "stage2.yaml")
    found = place(recipe, ["inner.memory_policy=save_activations"], None, H100)
    assert found.config.training.cuda_graphs
    # What the command says wins over the plan.
    assert found.config.inner.memory_policy == "save_activations"


def test_sizes_that_are_named_win():
    recipe = str(RECIPES / "3b" / "extend-e2e-32k.yaml")
    found = place(recipe, ["parallel.tensor=4"], 2, H100)
    assert (found.config.parallel.tensor, found.config.parallel.data) == (4, 4)
    assert found.overrides == ["parallel.data=4"]
    whole = place(recipe, ["parallel.tensor=2", "parallel.data=16"], None, H100)
    assert (whole.nodes, whole.processes) == (4, 8)
    assert whole.overrides == []
    small = place(recipe, ["parallel.data=2"], None, H100)
    assert (small.nodes, small.processes) == (1, 2)


def test_on_cpus_all_are_replicas(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, "runs/r")
    text = recipe.read_text().replace("parallel:\n  data: 2\n", "parallel:\n")
    recipe.write_text(text)
    found = place(str(recipe), [], 4, cpu_profile())
    assert found.overrides == ["parallel.data=4", "training.micro_batch_size=1"]
    assert found.origin == "data-parallel alone"


@pytest.mark.parametrize(
    ("overrides", "nodes", "said"),
    [
        (["parallel.data=1"], 2, "1 processes, which do not fit 2 nodes of 8 evenly"),
        (["parallel.data=32"], 2, "32 processes, which do not fit 2 nodes of 8 evenly"),
        (["parallel.tensor=3"], 1, "replicas of 3 processes, which do not fill 8 evenly"),
        (["training.device=cpu"], 5, "not a multiple of the 40 processes"),
        ([], 0, "--nodes 0: give 1 or more"),
        (["model.num_layers=3000"], 1, "no layout of 8 x h100 fits"),
        (["parallel.dta=3"], 1, "the nearest known key is parallel.data"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, nodes, said):
    with pytest.raises(UserError) as error:
        place(str(RECIPES / "3b" / "extend-e2e-32k.yaml"), overrides, nodes, H100)
    assert said in str(error.value)
