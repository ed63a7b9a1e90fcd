"""The generated reference of keys."""

from ttt_megatron.config import describe, key_references
from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.yaml_text import parse_yaml


def test_every_key_is_there_with_help_and_a_default_that_a_recipe_can_hold():
    expected = to_flat(RunConfig())
    references = key_references()
    assert {r.name: parse_yaml(r.default, r.name) for r in references} == expected
    for reference in references:
        assert reference.help.endswith("."), reference.name
        assert f"| `{reference.name}` | `{reference.default}` |" in describe()
    assert len(describe().splitlines()) == len(references) + 2
