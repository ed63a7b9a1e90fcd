"""Schedules run for real, with real messages between real processes, and passes that only sleep."""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ttt_megatron.meta.part import Boundary, Part
from ttt_megatron.model.attention import KV
from ttt_megatron.parallel.context import _Halo, context_parts
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.context_schedule import one_forward_one_backward
from ttt_megatron.parallel.context_tasks import zigzag_order
from ttt_megatron.planning.schedules import PhaseSeconds

LENGTH, WINDOW = 4, 3


@dataclass(frozen=True)
class Run:
    """One step: the order, ranks a sequence, micro-batches, seconds of a whole sequence."""

    order: str
    ranks: int
    micro_batches: int
    seconds: PhaseSeconds


@dataclass
class Sleeper:
    """The passes of a rank: their messages are those of a step, their work is a sleep.

    Messages hold the sender's clock. With `sleeps` the clock is the machine's. Without it time is
    counted instead of spent: a pass adds its seconds, and what is received was not there before
    its sender had sent it; so waits are exact, however busy the machine.
    """

    seconds: PhaseSeconds
    parts: dict[int, Part]
    number: int
    sleeps: bool
    clock: float = 0.0
    busy: float = 0.0
    _halos: dict[tuple[int, int], tuple[_Halo, KV | None]] = field(default_factory=dict)

    def _work(self, phase: str) -> None:
        seconds = getattr(self.seconds, phase) / self.number
        if self.sleeps:
            start = time.perf_counter()
            time.sleep(seconds)
            seconds = time.perf_counter() - start
        self.clock += seconds
        self.busy += seconds

    def _received(self, *tensors: Tensor) -> None:
        self.clock = max(self.clock, *(x.max().item() for x in tensors))

    def _filled(self, clock: float, length: int) -> Tensor:
        return torch.full((1, length, 1, 2), clock, dtype=torch.float64)

    def prefix_forward(self, micro_batch: int, part: int) -> None:
        """Its first layer exchanges the halo."""
        halo = self.parts[part].find_past()
        assert isinstance(halo, _Halo)
        own = self._filled(self.clock, LENGTH)
        past = halo.exchange(own, own)
        self._halos[micro_batch, part] = halo, past
        if past is not None:
            self._received(*past)
        self._work("prefix_forward")

    def prefix_backward(self, micro_batch: int, part: int) -> None:
        """The last layer exchanges the halo's gradients first."""
        halo, past = self._halos.pop((micro_batch, part))
        none = self._filled(0.0, LENGTH)
        to_left = None if past is None else KV(*(torch.full_like(x, self.clock) for x in past))
        self._received(*halo.exchange_gradients(none, none, to_left))
        self._work("prefix_backward")

    def suffix_forward(self, micro_batch: int, part: int) -> None:
        """The state comes before and leaves after."""
        before = self._boundary()
        self.parts[part].receive_state(before)
        self._received(*before.fast)
        self._work("suffix_forward")
        self.parts[part].send_state(self._boundary())

    def suffix_backward(self, micro_batch: int, part: int) -> None:
        """The same with the cotangent."""
        before = self._boundary()
        self.parts[part].receive_cotangent(before)
        self._received(*before.fast)
        self._work("suffix_backward")
        self.parts[part].send_cotangent(self._boundary())

    def suffix_weights(self, micro_batch: int, part: int) -> None:
        """Nobody waits for it."""
        self._work("suffix_weights")

    def prefix_weights(self, micro_batch: int, part: int) -> None:
        """The same."""
        self._work("prefix_weights")

    def _boundary(self) -> Boundary:
        return Boundary([torch.tensor([self.clock], dtype=torch.float64)], [])


def _take(run: Run, links: ContextLinks, sleeps: bool) -> Sleeper:
    """Runs a step."""
    parts = context_parts(links, LENGTH, WINDOW)
    by_part = dict(zip(links.own_parts, parts, strict=True))
    sleeper = Sleeper(run.seconds, by_part, links.num_parts, sleeps)
    if links.zigzag:
        order = zigzag_order(run.micro_batches, links.size, links.rank, run.seconds)
        for one in order:
            getattr(sleeper, one.kind)(one.micro_batch, one.part)
    else:
        [part] = links.own_parts

        def forward(index: int) -> None:
            sleeper.prefix_forward(index, part)
            sleeper.suffix_forward(index, part)

        def backward(index: int, _: None) -> None:
            sleeper.suffix_backward(index, part)
            sleeper.prefix_backward(index, part)

        ahead = links.size - 1 - links.rank
        one_forward_one_backward(run.micro_batches, ahead, forward, backward)
    links.settle()
    return sleeper


def waiting_shares(runs: list[Run], sleeps: bool) -> list[list[float]]:
    """Each run's share of the time that each of its ranks waits. Collective over 4 processes.

    Where a sequence takes two ranks, both pairs do the same. With `sleeps` the shortest of three
    tries counts: on a busy machine a sleep ends late.
    """
    dist.init_process_group("gloo")
    try:
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
        links = {
            (size, order): context_links(group, zigzag=order == "zigzag")
            for size, group in groups.items()
            for order in ("1f1b", "zigzag")
        }
        tries = 3 if sleeps else 1
        return [
            min(_measured(run, links[run.ranks, run.order], sleeps) for _ in range(tries))[1]
            for run in runs
        ]
    finally:
        dist.destroy_process_group()


def _measured(run: Run, links: ContextLinks, sleeps: bool) -> tuple[float, list[float]]:
    """Seconds of a step and the ranks' shares of waiting in it, of the first ranks that take it."""
    dist.barrier()
    start = time.time() if sleeps else 0.0
    sleeper = _take(run, links, sleeps)
    end = time.time() if sleeps else sleeper.clock
    found = [(0.0, 0.0, 0.0)] * 4
    dist.all_gather_object(found, (start, end, sleeper.busy))
    own = found[: run.ranks]
    seconds = max(end for _, end, _ in own) - min(begin for begin, _, _ in own)
    return seconds, [1 - busy / seconds for _, _, busy in own]
