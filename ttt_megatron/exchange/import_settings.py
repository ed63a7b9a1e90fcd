"""The configuration of an imported checkpoint: from its arrays, what it states, and the user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt_megatron.config import load_recipe, to_dict
from ttt_megatron.config.convert import from_dict
from ttt_megatron.config.keys import known_keys
from ttt_megatron.config.recipe import named_keys
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_source import ImportSource

_SAME_AS = {
    "model.num_kv_heads": "model.num_heads",
    "model.prime_ffn_hidden_size": "model.ffn_hidden_size",
}
"""What null stands for."""

_OF_THE_FUNCTION = ("model.window_size", "model.rope_theta", "model.norm_eps")


def resolve_settings(
    source: ImportSource, recipe: Path | None, overrides: Sequence[str], output: Path
) -> tuple[RunConfig, list[str]]:
    """The validated configuration to write, and a sentence for each setting it changes.

    What the arrays settle stands. Overrides and the keys that a recipe names come before what the
    source states, and what a recipe leaves out (its defaults) comes after.

    Raises UserError if a value that was given contradicts the arrays, or naming the keys that
    nobody gives.
    """
    given = named_keys(recipe, overrides)
    for key, found in source.shapes.items():
        if key not in given:
            continue
        if _meant(key, given[key], source.shapes) != _meant(key, found, source.shapes):
            raise UserError(
                f"{source.path}: its arrays say {key} = {_text(found)}, and {_text(given[key])} "
                f"is given; leave {key} out"
            )
    defaults = {} if recipe is None else _flat(load_recipe(recipe))
    values = defaults | source.stated | given | source.shapes
    missing = [key for key in source.required if key not in values]
    if missing:
        raise UserError(
            f"{source.path} does not say {', '.join(missing)}: give them as key=value (for "
            f"example {missing[0]}={_text(known_keys()[missing[0]].default)}), or a --recipe "
            f"that has them"
        )
    values["name"] = given.get("name", output.resolve().name)
    values["training.output"] = str(output)
    if values.get("model.num_suffix_layers") == 0 and "inner.mode" not in given:
        values["inner.mode"] = "off"
    chunk = values.get("inner.chunk_size", 1024)
    if "data.sequence_length" not in given and isinstance(chunk, int) and chunk > 0:
        values["data.sequence_length"] = chunk * max(1, 8192 // chunk)
    notes = [
        f"{key} = {_text(value)}, as given; the source has {_text(source.stated[key])}, so this "
        f"is not its function"
        for key, value in given.items()
        if key in _OF_THE_FUNCTION and key in source.stated and value != source.stated[key]
    ]
    return from_dict(values, str(source.path)), notes


def _meant(key: str, value: Any, shapes: dict[str, Any]) -> Any:
    """A value, null written as what it stands for."""
    return shapes.get(_SAME_AS[key]) if value is None and key in _SAME_AS else value


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _flat(config: RunConfig) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in to_dict(config).items()
        if isinstance(values, dict)
        for key, value in values.items()
    } | {"name": config.name}
