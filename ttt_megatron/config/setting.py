"""A field of the schema."""

from dataclasses import field
from typing import Any


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a default and one sentence of help."""
    return field(default=default, metadata={"help": text})
