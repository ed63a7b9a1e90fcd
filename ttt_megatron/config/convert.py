"""Between a RunConfig and plain dictionaries or YAML text."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from ttt_megatron.config.keys import check_value, known_keys, sections, unknown_key
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.validate import validate
from ttt_megatron.config.yaml_text import dump_yaml
from ttt_megatron.errors import UserError


def flatten(data: Any, source: str, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys with checked values; an empty section is no keys.

    Raises UserError for a key that is unknown or a value of the wrong type, naming `source`.
    """
    if not isinstance(data, Mapping):
        where = f"{prefix[:-1]} is a section and" if prefix else "the configuration"
        raise UserError(f"{source}: {where} must hold `key: value` pairs, not {data!r}.")
    flat: dict[str, Any] = {}
    for part, value in data.items():
        name = f"{prefix}{part}"
        if name in sections():
            found = flatten({} if value is None else value, source, name + ".")
        elif name in known_keys():
            found = {name: check_value(name, value, source)}
        else:
            # The full key inside an unknown section finds the nearest key, the section's name alone
            # often does not.
            while isinstance(value, Mapping) and value:
                part, value = next(iter(value.items()))
                name = f"{name}.{part}"
            raise unknown_key(name, source)
        for twice in found.keys() & flat.keys():
            # Possible as `optimizer.lr` beside `optimizer: {lr: ...}`.
            raise UserError(f"{source}: {twice} stands twice; remove one.")
        flat |= found
    return flat


def build(flat: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from checked dotted keys; the rest are defaults. Does not validate."""

    def section(cls: type, prefix: str) -> Any:
        hints = get_type_hints(cls)
        arguments: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name, hint = prefix + field.name, hints[field.name]
            if name in sections():
                arguments[field.name] = section(hint, name + ".")
            elif name in flat:
                arguments[field.name] = flat[name]
        return cls(**arguments)

    config: RunConfig = section(RunConfig, "")
    return config


def from_dict(data: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """The validated RunConfig that `data` describes; keys left out take their defaults.

    Raises UserError for unknown keys, wrong types and impossible values, naming `source`.
    """
    config = build(flatten(data, source))
    validate(config, source)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every key of `config` as nested dictionaries of plain values; `from_dict` reads it back."""
    return dataclasses.asdict(config)


def to_flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key, in the schema's order."""
    return _leaves(to_dict(config), "")


def _leaves(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def to_yaml(config: RunConfig) -> str:
    """Every key of `config` as YAML text, in the schema's order; a recipe that is complete."""
    return dump_yaml(to_dict(config))
