"""Sequences in parts: what the inner loop takes over from the part before, and hands on.

Parts are whole chunks. In the forward sweep the fast weights and the last keys and values of the
suffix go from each part to the next; in the reverse sweep their cotangents come back.
"""

from dataclasses import dataclass

from torch import Tensor

from ttt_megatron.model.attention import KV
from ttt_megatron.model.part import SequencePart


@dataclass(frozen=True)
class Boundary:
    """What crosses from one part to the next, or its cotangent.

    fast: the fast weights [b, out, in]; kv: for every suffix block after the first, the keys and
    values [b, k, n_kv, d] that the next part's first token can see.
    """

    fast: list[Tensor]
    kv: list[KV]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [*self.fast, *(tensor for kv in self.kv for tensor in kv)]


class Part(SequencePart):
    """A contiguous part of every sequence of a batch.

    This one is the whole: nothing comes from before or goes behind. All others replace every
    member.
    """

    is_first = True
    is_last = True

    def whole_length(self, length: int) -> int:
        """Tokens of the whole sequences, given those of this part."""
        return length

    def receive_state(self, state: Boundary) -> None:
        """Fill `state` with what the part before ended in; the first part leaves it as it is."""

    def expect_state(self, rows: int) -> None:
        """The state of a batch of so many sequences may come in from now on.

        A pass that receives it has to follow; all passes are expected in their order.
        """

    def send_state(self, state: Boundary) -> None:
        """Hand on what this part ended in; the tensors may change afterwards."""

    def receive_cotangent(self, cotangent: Boundary) -> None:
        """Fill in the cotangent of what was sent; the last part leaves it as it is."""

    def expect_cotangent(self, rows: int) -> None:
        """The same for the cotangent of what was sent."""

    def send_cotangent(self, cotangent: Boundary) -> None:
        """Hand back the cotangent of what was received."""


WHOLE = Part()
