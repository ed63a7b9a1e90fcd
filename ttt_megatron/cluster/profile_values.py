"""The check of a profile's keys and values against the types of its fields."""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from ttt_megatron.errors import UserError

_WORDS: dict[Any, str] = {
    int: "an integer",
    str: "text (in quotes, if it looks like a number)",
    list[str]: "a list of texts",
    dict[str, str]: "`NAME: text` pairs",
}


def refuse_unknown(
    names: Iterable[str], known: Sequence[str], source: str, prefix: str = ""
) -> None:
    """Raises UserError naming the nearest key for one that there is not."""
    for name in names:
        if name not in known:
            near = max(known, key=lambda one: difflib.SequenceMatcher(None, name, one).ratio())
            raise UserError(
                f"{source}: unknown key {prefix}{name}; the nearest known key is {prefix}{near} "
                f"(all: {', '.join(known)})"
            )


def check_fields(
    cls: type, values: Mapping[str, Any], source: str, prefix: str = ""
) -> dict[str, Any]:
    """The values, each of its field's type; UserError naming key and value for one that is not."""
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        optional = get_origin(hint) in (Union, types.UnionType)
        kind = get_args(hint)[0] if optional else hint
        if not ((optional and value is None) or _is(value, kind)):
            words = _WORDS[kind] + (" or null" if optional else "")
            raise UserError(f"{source}: {prefix}{name} must be {words}, not {value!r}")
        found[name] = _variables(value, f"{source}: {name}") if kind == dict[str, str] else value
        if any("\n" in text for text in _texts(value)):
            raise UserError(f"{source}: {prefix}{name} holds the end of a line; write one line")
    return found


def _variables(values: Mapping[str, Any], source: str) -> dict[str, str]:
    for name in values:
        if not name.isidentifier():
            raise UserError(f"{source}: {name!r} is no name of a variable")
    return {name: str(value) for name, value in values.items()}


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _is(value: Any, kind: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if kind == dict[str, str]:
        return isinstance(value, dict) and all(type(one) in (str, int) for one in value.values())
    if dataclasses.is_dataclass(kind):
        return isinstance(value, kind)  # type: ignore[arg-type]
    return type(value) is kind
