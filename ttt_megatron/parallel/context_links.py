"""Messages between the ranks that hold the parts of the same sequences.

What one part needs of another always comes from an earlier part in a forward pass and from a
later one in a backward pass. Each direction has a process group of its own: in one group, whose
messages are taken in order, a forward pass on one rank and a backward pass on its neighbour would
wait for each other for ever. For the same reason every kind of message has a group of its own,
since a state may be expected while halos are exchanged, and so have messages between the first and
the second parts of ranks that hold two, whose passes mix differently on different ranks. Of these,
messages to higher and to lower ranks are apart too: two ranks that send to each other in one group,
each before it receives, would wait for ever with NCCL, which takes a pair's messages in turn.
"""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ttt_megatron.tracing import span

Direction = Literal["forward", "backward"]
Kind = Literal["halo", "state", "stream"]
"""Keys and values in the prefix, the inner loop's state, or the stream from one pipeline stage to
the next; or the cotangents of any of them."""


class Channel:
    """Messages of a kind, which arrive in the order they are sent.

    Sending never waits: one rank would wait in a forward pass for its neighbour in a backward
    pass, and the other way round. A message can come in before it is asked for, if it is expected.
    `bytes_sent` counts by kind; `seconds_waited` is the time the host was blocked in `receive`
    (with NCCL the device waits instead).
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._rank = group.rank()
        self._to_itself: deque[Tensor] = deque()
        self._under_way: deque[tuple[Work, Tensor]] = deque()
        self._expected: deque[tuple[Work, Tensor]] = deque()
        self.bytes_sent: Counter[Kind] = Counter()
        self.seconds_waited = 0.0

    def send(self, message: Tensor, peer: int, kind: Kind) -> None:
        """Send a contiguous tensor, not to be changed any more, to a rank of the group."""
        if message.numel() == 0:
            return
        if peer == self._rank:
            self._to_itself.append(message)
            return
        work = dist.isend(message, group=self._group, group_dst=peer)
        assert work is not None
        self._under_way.append((work, message))
        self.bytes_sent[kind] += message.numel() * message.element_size()
        # Gloo knows of an arrival only once it is waited for: there, `settle` frees the buffers.
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()

    def receive(self, into: Tensor, peer: int, kind: Kind) -> None:
        """Fill a tensor with the next message of a rank of the group."""
        if into.numel() == 0:
            return
        if peer == self._rank:
            into.copy_(self._to_itself.popleft())
            return
        if self._expected:
            work, buffer = self._expected.popleft()
            if buffer.shape != into.shape or buffer.dtype != into.dtype:
                raise RuntimeError(
                    f"{kind} of the shape {tuple(buffer.shape)} was expected from rank {peer}, and "
                    f"{tuple(into.shape)} is to be received"
                )
        else:
            buffer = into if into.is_contiguous() else torch.empty_like(into).contiguous()
            work = self._begin(buffer, peer)
        start = time.perf_counter()
        with span(f"wait for {kind}"):
            work.wait()
        self.seconds_waited += time.perf_counter() - start
        if buffer is not into:
            into.copy_(buffer)

    def expect(self, buffer: Tensor, peer: int) -> None:
        """Let the next message of a rank come into a contiguous buffer from now on.

        The `receive` that is called for it takes it from there; messages are received in the order
        they are expected in.
        """
        if buffer.numel() and peer != self._rank:
            self._expected.append((self._begin(buffer, peer), buffer))

    def _begin(self, buffer: Tensor, peer: int) -> Work:
        work = dist.irecv(buffer, group=self._group, group_src=peer)
        assert work is not None
        return work

    def settle(self) -> None:
        """Wait until everything sent has arrived; then nothing is kept any more."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


Like = tuple[torch.Size, torch.dtype, torch.device]
"""What it takes to make a buffer."""
Lane = tuple[Direction, Kind, bool, bool, bool]
"""Direction, kind, whether the earlier and the later part are a rank's second, and whether the
later one's rank is the higher."""


@dataclass(frozen=True, kw_only=True)
class ContextLinks:
    """This rank's place, `rank` of `size`, among those that share its sequences.

    Sequences are in `size` parts, rank r holding part r; with `zigzag` in 2·size parts, rank r
    holding parts r and 2·size − 1 − r.
    """

    rank: int
    size: int
    zigzag: bool
    channels: dict[Lane, Channel]
    known: dict[tuple[Direction, int, int, int], list[Like]] = field(default_factory=dict)
    """What a part of the one model that uses these links has received as state: by direction, the
    part's start and length, and number of rows."""

    @property
    def num_parts(self) -> int:
        """Parts of a sequence, on all ranks."""
        return 2 * self.size if self.zigzag else self.size

    @property
    def own_parts(self) -> list[int]:
        """This rank's parts, in order."""
        return [part for part in range(self.num_parts) if self.owner(part) == self.rank]

    def owner(self, part: int) -> int:
        """The rank that holds a part."""
        return part if part < self.size else 2 * self.size - 1 - part

    def channel(self, direction: Direction, kind: Kind, part: int, other: int) -> Channel:
        """The channel of such messages between two parts."""
        earlier, later = sorted((part, other))
        rises = self.owner(earlier) <= self.owner(later)
        return self.channels[direction, kind, earlier >= self.size, later >= self.size, rises]

    def bytes_sent(self, direction: Direction, kind: Kind) -> int:
        """Bytes this rank has sent to others."""
        lanes = {id(c): c for lane, c in self.channels.items() if lane[0] == direction}
        return sum(channel.bytes_sent[kind] for channel in lanes.values())

    def settle(self) -> None:
        """Wait until everything sent has arrived."""
        for channel in self.channels.values():
            channel.settle()


def context_links(
    group: ProcessGroup, timeout: timedelta | None = None, *, zigzag: bool = False
) -> ContextLinks:
    """Links within this rank's context-parallel group; `timeout` is that of a wait for a message.

    Collective over all ranks of the run.
    """
    own = dist.get_process_group_ranks(group)
    found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    channels: dict[Lane, Channel] = {}
    for ranks in sorted({tuple(ranks) for ranks in found}):
        for lanes in _lanes(zigzag):
            made = dist.new_group(list(ranks), timeout=timeout)
            if list(ranks) == own:
                channels |= dict.fromkeys(lanes, Channel(made))
    return ContextLinks(rank=group.rank(), size=group.size(), zigzag=zigzag, channels=channels)


def _lanes(zigzag: bool) -> list[list[Lane]]:
    """The lanes that share a channel."""
    directions: tuple[Direction, ...] = ("forward", "backward")
    kinds: tuple[Kind, ...] = ("halo", "state")
    if not zigzag:
        return [
            [(direction, kind, False, False, True)] for direction in directions for kind in kinds
        ]
    turns = [
        (False, False, True),
        (False, True, True),
        (False, True, False),
        (True, True, False),
    ]
    return [[(d, kind, *turn)] for d in directions for kind in kinds for turn in turns]
