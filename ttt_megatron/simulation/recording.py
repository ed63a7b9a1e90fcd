"""What one rank sends and receives, recorded instead of sent, and all ranks' records matched.

Everything runs as on the rank itself, on fake process groups, up to torch's `isend` and `irecv`.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ttt_megatron.parallel.groups import groups_made

GroupKey = tuple[tuple[int, ...], int]
"""A group's ranks, and its place among the groups of the same ranks."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """A send or a receive that a rank began: with whom, in which group, of what."""

    kind: Literal["send", "receive"]
    rank: int
    peer: int
    group: GroupKey
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        where = "to" if self.kind == "send" else "from"
        return f"rank {self.rank}'s {self.kind} {where} rank {self.peer} of {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A rank waits until the message it began as its `index`-th has gone through."""

    index: int


Record = list[Message | Wait]
"""What a rank did, in its order."""


class _Work:
    """What `isend` and `irecv` return: waiting is recorded."""

    def __init__(self, record: Record, index: int) -> None:
        self._record, self._index = record, index

    def wait(self, timeout: Any = None) -> bool:
        self._record.append(Wait(index=self._index))
        return True

    def is_completed(self) -> bool:
        return False


@contextmanager
def recording() -> Iterator[Record]:
    """Within, messages of this process, one rank of a fake world, are recorded; zeros arrive.

    torch.distributed's two functions are replaced for the time: megatron-core calls them too.
    """
    record: Record = []
    begun = 0
    keys: dict[int, GroupKey] = {}

    def key_of(group: ProcessGroup) -> GroupKey:
        if not keys:
            seen: dict[tuple[int, ...], int] = defaultdict(int)
            for made in groups_made():
                ranks = tuple(dist.get_process_group_ranks(made))
                keys[id(made)] = ranks, seen[ranks]
                seen[ranks] += 1
        return keys[id(group)]

    def begin(
        kind: Literal["send", "receive"],
        tensor: torch.Tensor,
        peer: int | None,
        group: ProcessGroup | None,
        group_peer: int | None,
    ) -> _Work:
        nonlocal begun
        group = group or dist.group.WORLD
        assert group is not None
        if peer is None:
            assert group_peer is not None
            peer = dist.get_global_rank(group, group_peer)
        shape, dtype = tuple(tensor.shape), str(tensor.dtype)
        message = Message(
            kind=kind,
            rank=dist.get_rank(),
            peer=peer,
            group=key_of(group),
            shape=shape,
            dtype=dtype,
        )
        record.append(message)
        begun += 1
        return _Work(record, begun - 1)

    def isend(
        tensor: torch.Tensor,
        dst: int | None = None,
        group: ProcessGroup | None = None,
        tag: int = 0,
        group_dst: int | None = None,
    ) -> _Work:
        return begin("send", tensor, dst, group, group_dst)

    def irecv(
        tensor: torch.Tensor,
        src: int | None = None,
        group: ProcessGroup | None = None,
        tag: int = 0,
        group_src: int | None = None,
    ) -> _Work:
        with torch.no_grad():
            tensor.zero_()
        return begin("receive", tensor, src, group, group_src)

    own = dist.isend, dist.irecv
    dist.isend, dist.irecv = isend, irecv  # type: ignore[assignment]
    try:
        yield record
    finally:
        dist.isend, dist.irecv = own


Lane = tuple[GroupKey, int]
"""A group and a peer: NCCL has a communicator for each, which takes messages in turn."""


class _Rank:
    """A rank's record on its way: what has begun and has not gone through yet, by lane."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._place = 0
        self._begun: list[Message] = []
        self._done: set[int] = set()
        self._queues: dict[Lane, deque[int]] = defaultdict(deque)

    def advance(self) -> bool:
        """Begins messages up to a wait for one that has not gone through; whether it moved."""
        start = self._place
        while self._place < len(self._record):
            one = self._record[self._place]
            if isinstance(one, Wait):
                if one.index not in self._done:
                    break
            else:
                self._queues[one.group, one.peer].append(len(self._begun))
                self._begun.append(one)
            self._place += 1
        return self._place > start

    @property
    def lanes(self) -> list[Lane]:
        """Lanes in which a message is under way."""
        return [lane for lane, queue in self._queues.items() if queue]

    def first(self, lane: Lane) -> Message | None:
        """The message whose turn it is in a lane."""
        queue = self._queues[lane]
        return self._begun[queue[0]] if queue else None

    def finish(self, lane: Lane) -> None:
        """The first message of a lane has gone through."""
        self._done.add(self._queues[lane].popleft())

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return self._place == len(self._record) and not self.lanes


def match(records: dict[int, Record]) -> int:
    """The number of messages that ranks exchange when all run their records against each other.

    Two ranks' messages in a group go through one after the other, each when both have come to it,
    as NCCL's do: stricter than gloo, where sends wait for nobody.

    Raises RuntimeError for messages that no one takes, or of other shapes than are expected, and
    where ranks wait for each other.
    """
    ranks = {rank: _Rank(record) for rank, record in records.items()}
    passed, moving = 0, True
    while moving:
        moving = False
        for number, rank in ranks.items():
            moving |= rank.advance()
            for group, other in rank.lanes:
                own, theirs = rank.first((group, other)), None
                if other in ranks:
                    theirs = ranks[other].first((group, number))
                if own is None or theirs is None:
                    continue
                if theirs.kind == own.kind:
                    raise RuntimeError(f"{own} meets {theirs}")
                if (theirs.shape, theirs.dtype) != (own.shape, own.dtype):
                    raise RuntimeError(f"{own} ({own.dtype}) meets {theirs} ({theirs.dtype})")
                rank.finish((group, other))
                ranks[other].finish((group, number))
                passed, moving = passed + 1, True
    stuck = [rank for rank in ranks.values() if not rank.is_done]
    if stuck:
        waiting = [str(one.first(lane)) for one in stuck for lane in one.lanes]
        raise RuntimeError(f"{len(stuck)} ranks wait for ever: {'; '.join(waiting[:4])}")
    return passed
