"""How passes over chunks are run: called as they are, or through something that repeats them."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ttt_megatron.meta.chunk import Suffix

Plan = TypeVar("Plan", bound="SuffixPlan")
Given = TypeVar("Given")
Found = TypeVar("Found")


class SuffixPlan(Protocol):
    """What decides, besides the shapes of its tensors, which operations a pass runs; hashable."""

    @property
    def suffix(self) -> Suffix:
        """Whose slow weights the pass reads."""


Pass = Callable[[Plan, Given, list[Tensor]], Found]
"""A function of tensors: of those in `Given` it makes those in `Found`, detached.

The last argument are leaves for the slow weights, to whose `.grad` their gradients are added; empty
for a pass that forms none. Nothing else is changed, and nothing on the host depends on a tensor's
values.
"""


class Runner(Protocol):
    """Runs passes."""

    def run(
        self, function: Pass[Plan, Given, Found], plan: Plan, given: Given, slow: list[Tensor]
    ) -> Found:
        """What the pass finds; it may be overwritten by the next one, except for what is kept."""

    def keep(self, found: Found) -> Found:
        """The same for good."""

    def start_gradients(self, slow: list[Tensor]) -> None:
        """Before a sweep that forms the slow weights' gradients in these leaves: none yet."""

    def gradients(self, slow: list[Tensor]) -> list[Tensor]:
        """After it: the gradients, for good; zeros where nothing came."""


class Direct:
    """Calls passes as they are."""

    def run(
        self, function: Pass[Plan, Given, Found], plan: Plan, given: Given, slow: list[Tensor]
    ) -> Found:
        """As `Runner`."""
        return function(plan, given, slow)

    def keep(self, found: Found) -> Found:
        """As it is: every pass makes tensors of its own."""
        return found

    def start_gradients(self, slow: list[Tensor]) -> None:
        """Nothing to do: fresh leaves have no gradient."""

    def gradients(self, slow: list[Tensor]) -> list[Tensor]:
        """As `Runner`."""
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in slow]


DIRECT = Direct()
