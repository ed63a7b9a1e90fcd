"""What an import knows of a checkpoint of another implementation before it reads the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_megatron.config.schema import ModelConfig

Weights = dict[str, Tensor]
"""Parameters of a `LanguageModel` by name, float32, on the CPU."""

Place = Callable[[str, Weights, ModelConfig], None]
"""Reads the source's array of this name and copies it to where it belongs among the weights."""


@dataclass(frozen=True, kw_only=True)
class ImportSource:
    """A checkpoint that has been looked at, its arrays' names and shapes held to one another.

    Attributes:
        path: what was looked at, as messages name it.
        kind: in words, as in "checkpoint of the official implementation".
        shapes: settings that the arrays settle, by dotted key.
        stated: settings that the source states, or that its kind has; these may be overridden.
        required: settings that neither says, and without which the weights are no model.
        step: outer steps done.
        arrays: names of the arrays, in the order they are to be read.
        place: see `Place`; raises UserError if the array cannot be read or is not finite.
        tokenizer: where the source has a tokenizer.json, if it does.
        notes: what a user should know, a sentence each.
    """

    path: Path
    kind: str
    shapes: dict[str, Any]
    stated: dict[str, Any] = field(default_factory=dict)
    required: Sequence[str] = ()
    step: int = 0
    arrays: Sequence[str]
    place: Place
    tokenizer: Path | None = None
    notes: Sequence[str] = ()
