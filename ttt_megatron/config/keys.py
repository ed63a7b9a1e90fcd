"""The known keys, their types, and the check of one value against its key's type."""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError

NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One setting: its dotted name, the kind of value it takes, its default and its help."""

    name: str
    kind: type  # bool, int, float or str
    optional: bool
    choices: tuple[str, ...]  # empty unless the schema lists the values
    default: Any
    help: str

    @property
    def expected(self) -> str:
        """The kind of value in words, for messages and the reference."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        else:
            words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}[
                self.kind
            ]
        return f"{words} or null" if self.optional else words


def _key(name: str, hint: Any, field: "dataclasses.Field[Any]") -> Key:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        optional = len(arms) < len(get_args(hint))
        hint = arms[0] if len(arms) == 1 else None
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else hint
    if kind not in (bool, int, float, str):
        raise TypeError(f"the schema's {name} has a type that recipes cannot express: {field.type}")
    return Key(
        name=name,
        kind=kind,
        optional=optional,
        choices=choices,
        default=field.default,
        help=field.metadata.get("help", ""),
    )


def _walk(cls: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _walk(hint, name + ".")
        else:
            yield _key(name, hint, field)


@cache
def known_keys() -> dict[str, Key]:
    """Every key of a run by its dotted name, in the schema's order."""
    return {key.name: key for key in _walk(RunConfig, "")}


@cache
def sections() -> frozenset[str]:
    """Names of the groups of keys, such as `model`."""
    return frozenset(name.rpartition(".")[0] for name in known_keys() if "." in name)


def nearest_key(name: str) -> str:
    """The known key that looks most like `name`; a key's last part alone finds it too."""
    same_leaf = [key for key in known_keys() if key.rpartition(".")[2] == name.rpartition(".")[2]]
    candidates = same_leaf or list(known_keys())

    def likeness(key: str) -> tuple[float, int]:
        # Of keys with the same last part, the one of fewer sections.
        depth = -key.count(".")
        whole = difflib.SequenceMatcher(None, name, key).ratio()
        if "." in name:
            return whole, depth
        leaf = difflib.SequenceMatcher(None, name, key.rpartition(".")[2]).ratio()
        return max(whole, leaf), depth

    return max(candidates, key=likeness)


def unknown_key(name: str, source: str) -> UserError:
    """The error for a key that does not exist, naming the nearest one that does."""
    return UserError(
        f"{source}: unknown key {name}; the nearest known key is {nearest_key(name)} "
        "(`ttt-megatron config --keys` lists all)."
    )


def check_value(name: str, value: Any, source: str) -> Any:
    """`value` as the type that key `name` has.

    Floats accept integers and numbers written as text (YAML 1.1 reads `1e-3` as text); integers
    accept neither booleans nor floats.

    Raises UserError, naming `source`, the key, the value and the expected type.
    """
    key = known_keys()[name]
    if value is None and key.optional:
        return None
    if key.kind is float:
        if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif key.choices:
        if value in key.choices:
            return value
    elif type(value) is key.kind:
        return value
    raise UserError(f"{source}: {name} must be {key.expected}, not {value!r}.")
