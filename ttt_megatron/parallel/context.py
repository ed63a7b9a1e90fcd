"""Context parallelism: each rank holds a contiguous part of every sequence.

In the prefix a part's queries look at keys of the parts before it, the *halo*. In the suffix the
fast weights and the last keys and values are relayed from part to part.
"""

from typing import Any

import torch
from torch import Tensor

from ttt_megatron.errors import UserError
from ttt_megatron.meta.part import WHOLE, Boundary, Part
from ttt_megatron.model.attention import KV, FindPast
from ttt_megatron.parallel.context_links import ContextLinks


def part_length(sequence_length: int, chunk_size: int, size: int) -> int:
    """Tokens of one part of `size`.

    Raises UserError unless all parts are equally many whole chunks.
    """
    if size > 1 and sequence_length % (size * chunk_size):
        raise UserError(
            f"parallel.context={size} cannot cut data.sequence_length={sequence_length} into equal "
            f"parts of whole chunks: make it a multiple of {size} * inner.chunk_size={chunk_size}"
        )
    return sequence_length // size


def own_part(x: Tensor, links: ContextLinks) -> Tensor:
    """This rank's tokens of [b, T]: [b, T/size]."""
    return x.chunk(links.size, dim=1)[links.rank]


def context_part(links: ContextLinks | None, length: int, window: int | None) -> Part:
    """This rank's part, of `length` tokens, of sequences whose queries see `window` keys."""
    if links is None or links.size == 1:
        return WHOLE
    return ContextPart(links, length, window)


class ContextPart(Part):
    """Part r of R: the tokens from r·length on, length many.

    Good for any number of batches, if all ranks run the same passes in the same order.
    """

    def __init__(self, links: ContextLinks, length: int, window: int | None) -> None:
        self.start = links.rank * length
        self.length = length
        self.is_first = links.rank == 0
        self.is_last = links.rank == links.size - 1
        self._links = links
        self._window = window

    def whole_length(self, length: int) -> int:
        """Tokens of the whole sequences."""
        return self._links.size * length

    def find_past(self) -> FindPast:
        """The halo of one attention layer in one pass."""
        rank, size = self._links.rank, self._links.size
        distances = range(1, size)
        seen = {d: visible_entries(d, self.length, self._window) for d in distances}
        return _Halo(
            self._links,
            to_right=[(rank + d, seen[d]) for d in distances if rank + d < size and seen[d]],
            to_left=[(rank - d, seen[d]) for d in distances if rank - d >= 0 and seen[d]],
        )

    def receive_state(self, state: Boundary) -> None:
        """From the left; blocks."""
        if not self.is_first:
            for tensor in state.tensors:
                self._links.forward.receive(tensor, self._links.rank - 1, "state")

    def send_state(self, state: Boundary) -> None:
        """To the right."""
        if not self.is_last:
            for tensor in state.tensors:
                self._links.forward.send(_copy(tensor), self._links.rank + 1, "state")

    def receive_cotangent(self, cotangent: Boundary) -> None:
        """From the right; blocks."""
        if not self.is_last:
            for tensor in cotangent.tensors:
                self._links.backward.receive(tensor, self._links.rank + 1, "state")

    def send_cotangent(self, cotangent: Boundary) -> None:
        """To the left."""
        if not self.is_first:
            for tensor in cotangent.tensors:
                self._links.backward.send(_copy(tensor), self._links.rank - 1, "state")


def visible_entries(distance: int, length: int, window: int | None) -> int:
    """How many tokens of the part `distance` parts before it a part's first token can see."""
    if window is None:
        return length
    return max(0, min(length, window - 1 - (distance - 1) * length))


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


class _Halo:
    """The exchange of one attention layer in one pass.

    to_right and to_left name the ranks that take part, nearest first, and how many of the left
    one's last tokens the right one sees.
    """

    def __init__(
        self, links: ContextLinks, to_right: list[tuple[int, int]], to_left: list[tuple[int, int]]
    ) -> None:
        self._links = links
        self._to_right = to_right
        self._to_left = to_left
        self._past: KV | None = None
        self._exchanged = False

    def __call__(self, own: KV) -> tuple[KV, KV | None]:
        k, v, past_k, past_v = _Exchange.apply(own.k, own.v, self)
        return KV(k, v), None if past_k is None else KV(past_k, past_v)

    def exchange(self, k: Tensor, v: Tensor) -> KV | None:
        """Send the last keys and values to the right; receive those from the left.

        The second time, as a recomputed forward pass asks for it, nothing is sent: a neighbour
        would have to stop its own backward pass for this one.
        """
        if self._exchanged:
            return self._past
        self._exchanged = True
        channel = self._links.forward
        for peer, entries in self._to_right:
            channel.send(torch.stack((k[:, -entries:], v[:, -entries:])), peer, "halo")
        received = []
        for peer, entries in self._to_left:
            buffer = k.new_empty(2, k.shape[0], entries, *k.shape[2:])
            channel.receive(buffer, peer, "halo")
            received.append(buffer)
        if received:
            self._past = KV(*torch.cat(received[::-1], dim=2).unbind(0))
        return self._past

    def exchange_gradients(
        self, dk: Tensor, dv: Tensor, d_past: KV | None
    ) -> tuple[Tensor, Tensor]:
        """Send the past's gradients back to the left; add those from the right to dk and dv."""
        channel = self._links.backward
        if d_past is not None:
            stop = d_past.k.shape[1]
            for peer, entries in self._to_left:
                rows = slice(stop - entries, stop)
                channel.send(torch.stack([d[:, rows] for d in d_past]), peer, "halo")
                stop -= entries
        if self._to_right:
            dk, dv = dk.clone(), dv.clone()
        for peer, entries in self._to_right:
            buffer = dk.new_empty(2, dk.shape[0], entries, *dk.shape[2:])
            channel.receive(buffer, peer, "halo")
            dk[:, -entries:] += buffer[0]
            dv[:, -entries:] += buffer[1]
        return dk, dv


class _Exchange(torch.autograd.Function):
    """One node a layer: in the backward pass its gradients meet those from the right."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, halo: _Halo
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.halo = halo
        past = halo.exchange(k, v)
        if past is None:
            return k.view_as(k), v.view_as(v), None, None
        # Views: the outputs of the node must not be what the halo keeps, or it would keep itself.
        return k.view_as(k), v.view_as(v), past.k.detach(), past.v.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dk: Tensor, dv: Tensor, d_past_k: Tensor | None, d_past_v: Tensor | None
    ) -> tuple[Tensor, Tensor, None]:
        d_past = None
        if d_past_k is not None and d_past_v is not None:
            d_past = KV(d_past_k, d_past_v)
        return *ctx.halo.exchange_gradients(dk, dv, d_past), None
