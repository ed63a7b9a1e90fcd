"""Context parallelism: each rank holds a contiguous part of every sequence, or two.

In the prefix a part's queries look at keys of the parts before it, the *halo*. In the suffix the
fast weights and the last keys and values are relayed from part to part.
"""

from typing import Any

import torch
from torch import Tensor

from ttt_megatron.errors import UserError
from ttt_megatron.meta.part import WHOLE, Boundary, Part
from ttt_megatron.model.attention import KV, FindPast
from ttt_megatron.parallel.context_links import ContextLinks, Direction


def part_length(sequence_length: int, chunk_size: int, num_parts: int) -> int:
    """Tokens of one part of `num_parts`.

    Raises UserError unless all parts are equally many whole chunks.
    """
    if num_parts > 1 and sequence_length % (num_parts * chunk_size):
        raise UserError(
            f"parallel.context cannot cut data.sequence_length={sequence_length} into {num_parts} "
            f"equal parts of whole chunks: make it a multiple of {num_parts} * "
            f"inner.chunk_size={chunk_size}"
        )
    return sequence_length // num_parts


def own_tokens(x: Tensor, links: ContextLinks) -> list[Tensor]:
    """This rank's parts of [b, T]: [b, T/number of parts] each."""
    parts = x.chunk(links.num_parts, dim=1)
    return [parts[index] for index in links.own_parts]


def context_parts(links: ContextLinks | None, length: int, window: int | None) -> list[Part]:
    """This rank's parts, of `length` tokens, of sequences whose queries see `window` keys."""
    if links is None or links.num_parts == 1:
        return [WHOLE]
    return [ContextPart(links, index, length, window) for index in links.own_parts]


class ContextPart(Part):
    """Part p: the tokens from p·length on, length many.

    Good for any number of batches, if all ranks take the batches of a part in the same order.
    """

    def __init__(self, links: ContextLinks, index: int, length: int, window: int | None) -> None:
        self.index = index
        self.start = index * length
        self.length = length
        self.is_first = index == 0
        self.is_last = index == links.num_parts - 1
        self._links = links
        self._window = window

    def whole_length(self, length: int) -> int:
        """Tokens of the whole sequences."""
        return self._links.num_parts * length

    def find_past(self) -> FindPast:
        """The halo of one attention layer in one pass."""
        distances = range(1, self._links.num_parts)
        seen = {d: visible_entries(d, self.length, self._window) for d in distances}
        last = self._links.num_parts - 1
        return _Halo(
            self._links,
            self.index,
            later=[(self.index + d, n) for d, n in seen.items() if n and self.index + d <= last],
            earlier=[(self.index - d, n) for d, n in seen.items() if n and self.index >= d],
        )

    def receive_state(self, state: Boundary) -> None:
        """From the part before; blocks."""
        if not self.is_first:
            self._receive(state, "forward", self.index - 1)

    def send_state(self, state: Boundary) -> None:
        """To the part behind."""
        if not self.is_last:
            self._send(state, "forward", self.index + 1)

    def receive_cotangent(self, cotangent: Boundary) -> None:
        """From the part behind; blocks."""
        if not self.is_last:
            self._receive(cotangent, "backward", self.index + 1)

    def send_cotangent(self, cotangent: Boundary) -> None:
        """To the part before."""
        if not self.is_first:
            self._send(cotangent, "backward", self.index - 1)

    def expect_state(self, rows: int) -> None:
        """Of the first such batch the shapes are not known: it comes when it is received."""
        if not self.is_first:
            self._expect("forward", self.index - 1, rows)

    def expect_cotangent(self, rows: int) -> None:
        """Likewise."""
        if not self.is_last:
            self._expect("backward", self.index + 1, rows)

    def _expect(self, direction: Direction, other: int, rows: int) -> None:
        channel = self._links.channel(direction, "state", self.index, other)
        for shape, dtype, device in self._links.known.get(
            (direction, self.start, self.length, rows), []
        ):
            buffer = torch.empty(shape, dtype=dtype, device=device)
            channel.expect(buffer, self._links.owner(other))

    def _send(self, boundary: Boundary, direction: Direction, other: int) -> None:
        channel = self._links.channel(direction, "state", self.index, other)
        for tensor in boundary.tensors:
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            channel.send(copy, self._links.owner(other), "state")

    def _receive(self, boundary: Boundary, direction: Direction, other: int) -> None:
        channel = self._links.channel(direction, "state", self.index, other)
        tensors = boundary.tensors
        for tensor in tensors:
            channel.receive(tensor, self._links.owner(other), "state")
        key = direction, self.start, self.length, len(tensors[0])
        self._links.known.setdefault(key, [(t.shape, t.dtype, t.device) for t in tensors])


def visible_entries(distance: int, length: int, window: int | None) -> int:
    """How many tokens of the part `distance` parts before it a part's first token can see."""
    if window is None:
        return length
    return max(0, min(length, window - 1 - (distance - 1) * length))


class _Halo:
    """The exchange of one attention layer in one pass.

    later and earlier name the parts that take part, nearest first, and how many of the earlier
    one's last tokens the later one sees.
    """

    def __init__(
        self,
        links: ContextLinks,
        index: int,
        later: list[tuple[int, int]],
        earlier: list[tuple[int, int]],
    ) -> None:
        self._links = links
        self._index = index
        self._later = later
        self._earlier = earlier
        self._past: KV | None = None
        self._exchanged = False

    def __call__(self, own: KV) -> tuple[KV, KV | None]:
        k, v, past_k, past_v = _Exchange.apply(own.k, own.v, self)
        return KV(k, v), None if past_k is None else KV(past_k, past_v)

    def exchange(self, k: Tensor, v: Tensor) -> KV | None:
        """Send the last keys and values to later parts; receive those of earlier ones.

        The second time, as a recomputed forward pass asks for it, nothing is sent: a neighbour
        would have to stop its own backward pass for this one.
        """
        if self._exchanged:
            return self._past
        self._exchanged = True
        for part, entries in self._later:
            self._send("forward", part, torch.stack((k[:, -entries:], v[:, -entries:])))
        received = [self._receive("forward", part, k, entries) for part, entries in self._earlier]
        if received:
            self._past = KV(*torch.cat(received[::-1], dim=2).unbind(0))
        return self._past

    def exchange_gradients(
        self, dk: Tensor, dv: Tensor, d_past: KV | None
    ) -> tuple[Tensor, Tensor]:
        """Send the past's gradients back; add those from later parts to dk and dv."""
        if d_past is not None:
            stop = d_past.k.shape[1]
            for part, entries in self._earlier:
                rows = slice(stop - entries, stop)
                self._send("backward", part, torch.stack([d[:, rows] for d in d_past]))
                stop -= entries
        if self._later:
            dk, dv = dk.clone(), dv.clone()
        for part, entries in self._later:
            d_own = self._receive("backward", part, dk, entries)
            dk[:, -entries:] += d_own[0]
            dv[:, -entries:] += d_own[1]
        return dk, dv

    def _send(self, direction: Direction, part: int, message: Tensor) -> None:
        channel = self._links.channel(direction, "halo", self._index, part)
        channel.send(message, self._links.owner(part), "halo")

    def _receive(self, direction: Direction, part: int, like: Tensor, entries: int) -> Tensor:
        message = like.new_empty(2, like.shape[0], entries, *like.shape[2:])
        channel = self._links.channel(direction, "halo", self._index, part)
        channel.receive(message, self._links.owner(part), "halo")
        return message


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
