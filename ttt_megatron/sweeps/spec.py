"""What a sweep is: what is varied around a recipe, and what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VALIDATION_LOSS = "validation_loss"
LOSSES = (VALIDATION_LOSS, "validation_first_chunk_loss", "validation_last_chunk_loss", "loss")
SEED = "training.seed"
RESERVED = {
    "name": "the sweep names its runs",
    "training.output": "every run has a folder of its own in the sweep's (--output)",
    "tracking.parent_run": "the sweep shows its runs under its own",
    "tracking.progress": "the sweep shows the progress of its runs",
}
"""Keys that a sweep sets by itself, and why."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Keys that change together, and the values they take in turn, one for each key."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's file says, checked as far as it can be without the base recipe.

    source: the file; base: the recipe around which is varied; settings: keys that all points have
    besides; named_points: points by name, beside the grid of the axes; seeds: empty leaves the
    base's; loss: the figure of the metrics log that is the result; evaluate: options of
    `ttt-megatron evaluate` by their names without dashes, None for no evaluation; asked: what these
    come to for each task, as evaluations write it down, once the command has read them.
    """

    source: str
    name: str
    base: Path
    output: str
    settings: dict[str, Any] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()
    named_points: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    loss: str = VALIDATION_LOSS
    evaluate: dict[str, Any] | None = None
    asked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def varied(self) -> list[str]:
        """Keys of all axes."""
        return [key for axis in self.axes for key in axis.keys]
