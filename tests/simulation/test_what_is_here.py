"""A simulated run looks at what is on the machine: data, weights to start from, the run itself."""

import pytest
import try_recipes

from ttt_megatron.config import to_yaml
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.errors import UserError
from ttt_megatron.planning.hardware import find_hardware
from ttt_megatron.simulation.simulate import simulate_run

PLAIN = "125m/pretrain-swa-8k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small run of a plain model, its data, and `recipe.yaml`, the run's. Read only."""
    folder = tmp_path_factory.mktemp("here")
    [trial] = try_recipes.try_recipes([PLAIN], folder)
    assert trial.problem is None
    config = try_recipes.small(try_recipes.runs()[PLAIN], folder)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder


def simulate(folder, *overrides):
    words = ["parallel.data=2", "training.precision=bf16", *overrides]
    return simulate_run(folder / "recipe.yaml", words, 2, find_hardware("h100"))


def new(folder):
    return [f"training.output={folder / 'other'}", f"training.init_from={run(folder)}"]


def run(folder):
    return folder / "runs" / "125m-pretrain-swa-8k"


def test_nothing_that_is_here_is_left_out(folder):
    found = simulate(folder, *new(folder))
    assert [text for text in found.unchecked if not text.startswith("what needs CUDA")] == []


def test_the_vocabulary_is_the_datas_where_the_recipe_leaves_it(folder):
    found = simulate(folder, *new(folder)[:1], "model.vocab_size=null")
    assert found.config.model.vocab_size == try_recipes.TOKENS
    with pytest.raises(UserError, match=r"vocab_size=100 is less than the 257 tokens of"):
        simulate(folder, *new(folder)[:1], "model.vocab_size=100")


def test_weights_of_another_model_are_refused(folder):
    with pytest.raises(UserError, match=r"init_from=.*: parameter .* has the shape .* there and"):
        simulate(folder, *new(folder), "model.ffn_hidden_size=64")
    with pytest.raises(UserError, match=r"init_from=.* has no parameter .*layers\.3\."):
        simulate(folder, *new(folder), "model.num_layers=4")


def test_a_plain_model_can_be_extended(folder):
    settings = ["model.num_suffix_layers=1", "inner.mode=meta"]
    assert simulate(folder, *new(folder), *settings).parts


def test_a_run_with_other_settings_in_the_output_folder_is_refused(folder):
    assert simulate(folder).parts
    with pytest.raises(UserError, match=r"a run with other settings: optimizer\.lr is"):
        simulate(folder, "optimizer.lr=1e-4")


def test_a_run_on_other_data_in_the_output_folder_is_refused(folder, tmp_path):
    (tmp_path / "text.txt").write_text("other words than those of the run\n" * 300)
    options = {"inputs": (str(tmp_path / "text.txt"),), "validation": 0, "workers": 1}
    prepare(PrepareOptions(output=str(tmp_path / "data"), **options))
    words = f"data.path={tmp_path / 'data'}", "training.eval_sequences=0"
    with pytest.raises(UserError, match=r"was trained on other data than .*/data holds"):
        simulate(folder, *words)
    # What begins anew may read anything.
    assert simulate(folder, *words, *new(folder)[:1]).parts
