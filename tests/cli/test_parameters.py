"""Counted parameters are those the built model has."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ttt_megatron.cli.main import main
from ttt_megatron.config import load_recipe
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.parameters import count_parameters
from ttt_megatron.model.transformer import LanguageModel

RECIPES = Path(__file__).parents[2] / "recipes"


def built(config):
    """Parameters of the built model by group of `ParameterCounts`, without memory for them."""
    with torch.device("meta"):
        model = LanguageModel(config)
    groups = dict.fromkeys(("embedding", "head", "blocks", "prime", "norms"), 0)
    for name, parameter in model.named_parameters():
        kind = "norms" if "norm" in name else "prime" if ".prime_mlp." in name else "blocks"
        kind = {"embedding": "embedding", "output": "head"}.get(name.split(".")[0], kind)
        groups[kind] += parameter.numel()
    return groups


@pytest.mark.parametrize(
    ("size", "total"), [("125m", 184_363_776), ("1b", 1_467_708_416), ("3b", None)]
)
def test_published_sizes(size, total):
    config = load_recipe(RECIPES / size / "base.yaml").model
    counts = count_parameters(config)
    assert dataclasses.asdict(counts) == built(config)
    assert total in (None, counts.total)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"tie_embeddings": False},
        {"num_suffix_layers": 0},
        {"prime_ffn_hidden_size": 40},
        {"post_norm": False},
        {"qk_norm": False, "num_kv_heads": 2},
    ],
)
def test_every_option_counts(options):
    shape = {"vocab_size": 31, "num_layers": 3, "num_suffix_layers": 2, "hidden_size": 32}
    config = ModelConfig(**{**shape, "num_heads": 4, "ffn_hidden_size": 48, **options})
    assert dataclasses.asdict(count_parameters(config)) == built(config)
    model = LanguageModel(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_the_sizes_of_recipes_are_printed_whole(capsys):
    assert main(["parameters"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.split()[1:]]
    totals = {row[0]: row[6] for row in rows[1:]}
    assert totals["125m"] == "184,363,776"
    assert totals["1b"] == "1,467,708,416"
    assert list(totals) == ["125m", "350m", "760m", "1b", "3b", "8b"]


def test_a_recipe_and_overrides(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text("model: {hidden_size: 32, num_heads: 4, ffn_hidden_size: 48}\n")
    assert main(["parameters", str(recipe), "model.vocab_size=1000"]) == 0
    assert "32,000" in capsys.readouterr().out
    assert main(["parameters", str(recipe)]) == 2
    assert "model.vocab_size is not set" in capsys.readouterr().err
