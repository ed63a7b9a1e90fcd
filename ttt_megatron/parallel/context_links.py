"""Messages between the ranks that hold the parts of the same sequences.

What one part needs of another always goes to the right in a forward pass and to the left in a
backward pass. Each direction has a process group of its own: in one group, whose messages are
taken in order, a forward pass on one rank and a backward pass on its neighbour would wait for
each other for ever.
"""

import time
from collections import Counter, deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ttt_megatron.tracing import span

Kind = Literal["halo", "state"]
"""Keys and values in the prefix, or the inner loop's state; or the cotangents of either."""


class Channel:
    """Messages in one direction, which arrive in the order they are sent.

    Sending never waits: one rank would wait in a forward pass for its neighbour in a backward
    pass, and the other way round. `bytes_sent` counts by kind; `seconds_waited` is the time the
    host was blocked in `receive` (with NCCL the device waits instead).
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._under_way: deque[tuple[Work, Tensor]] = deque()
        self.bytes_sent: Counter[Kind] = Counter()
        self.seconds_waited = 0.0

    def send(self, message: Tensor, peer: int, kind: Kind) -> None:
        """Send a contiguous tensor, not to be changed any more, to a rank of the group."""
        if message.numel() == 0:
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
        buffer = into if into.is_contiguous() else torch.empty_like(into).contiguous()
        start = time.perf_counter()
        with span(f"wait for {kind}"):
            work = dist.irecv(buffer, group=self._group, group_src=peer)
            assert work is not None
            work.wait()
        self.seconds_waited += time.perf_counter() - start
        if buffer is not into:
            into.copy_(buffer)

    def settle(self) -> None:
        """Wait until everything sent has arrived; then nothing is kept any more."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


@dataclass(frozen=True, kw_only=True)
class ContextLinks:
    """This rank's place, `rank` of `size`, among those that share its sequences."""

    rank: int
    size: int
    forward: Channel
    backward: Channel

    def settle(self) -> None:
        """Wait until everything sent has arrived."""
        self.forward.settle()
        self.backward.settle()


def context_links(group: ProcessGroup, timeout: timedelta | None = None) -> ContextLinks:
    """Links within this rank's context-parallel group; `timeout` is that of a wait for a message.

    Collective over all ranks of the run.
    """
    own = dist.get_process_group_ranks(group)
    found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    channels = []
    for ranks in sorted({tuple(ranks) for ranks in found}):
        pair = [dist.new_group(list(ranks), timeout=timeout) for _ in range(2)]
        if list(ranks) == own:
            channels = [Channel(one) for one in pair]
    return ContextLinks(
        rank=group.rank(), size=group.size(), forward=channels[0], backward=channels[1]
    )
