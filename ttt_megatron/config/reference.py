"""The reference of all keys, generated from the schema."""

import json
from dataclasses import dataclass

from ttt_megatron.config.keys import known_keys


@dataclass(frozen=True, kw_only=True)
class KeyReference:
    """One line of the reference; `type` and `default` in words, as a recipe would write them."""

    name: str
    type: str
    default: str
    help: str


def key_references() -> list[KeyReference]:
    """Every key of a recipe, in the schema's order."""
    return [
        KeyReference(
            name=key.name,
            type=key.expected,
            # JSON writes null, true and quoted text as YAML reads them.
            default=json.dumps(key.default),
            help=key.help,
        )
        for key in known_keys().values()
    ]


def describe() -> str:
    """The reference as a Markdown table: key, default, type, help."""
    rows = ["| key | default | value | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{key.name}` | `{key.default}` | {key.type} | {key.help} |" for key in key_references()
    ]
    return "\n".join(rows) + "\n"
