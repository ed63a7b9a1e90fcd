"""Passes over chunks from memory that never moves, so that a CUDA graph can repeat them.

A small model's chunk is many short kernels, and the host takes longer to launch them than the
device to run them. A CUDA graph launches all of a pass at once, but with the addresses it was
captured with. So every pass of a shape gets a `Program`: what it reads is copied into buffers of
its own, what it finds is copied into others, the slow weights are read where they lie and their
gradients summed in place. On CUDA the program is captured the first time and replayed from then
on; elsewhere it is run anew, through the very same buffers.

One set of programs serves all chunks, micro-batches and steps. Buffers are shared by tensors of
the same shape in different programs, as no program needs them between two runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttt_megatron.meta.chunk import Suffix
from ttt_megatron.meta.passes import Found, Given, Pass, Plan
from ttt_megatron.meta.substitute import substituted
from ttt_megatron.meta.tensor_tree import map_tensors, structure, tensors_of, with_tensors

WARM_UP_RUNS = 2
"""Runs before a capture, in which kernels are compiled and libraries make their workspaces."""


class _Buffers:
    """Memory for lists of tensors: the k-th of a shape and dtype always lies in one place."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Buffers like the tensors, contiguous."""
        found: list[Tensor] = []
        seen: dict[tuple[Any, ...], int] = {}
        for x in tensors:
            kind = (tuple(x.shape), x.dtype, x.device)
            number = seen[kind] = seen.get(kind, -1) + 1
            if (*kind, number) not in self._made:
                empty = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                self._made[*kind, number] = empty
            found.append(self._made[*kind, number])
        return found


@dataclass
class Program:
    """A pass at fixed shapes: its buffers, and on CUDA the graph that runs it."""

    given: Any
    found: Any
    run: Callable[[], None]


@dataclass
class ChunkPrograms:
    """A `Runner` of one model that runs passes as programs.

    The slow weights must change in place; where one has moved, all programs are made again.
    What a pass finds stays as it is until the next one runs: `keep` copies it.
    `made` counts the programs made so far.
    """

    made: int = 0
    _programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)
    _inputs: _Buffers = field(default_factory=_Buffers)
    _outputs: _Buffers = field(default_factory=_Buffers)
    _totals: list[Tensor] = field(default_factory=list)
    _addresses: list[int] = field(default_factory=list)
    _pool: Any = None

    def run(
        self, function: Pass[Plan, Given, Found], plan: Plan, given: Given, slow: list[Tensor]
    ) -> Found:
        """As `Runner`."""
        self._forget_moved(plan.suffix)
        key = (function, plan, structure(given), bool(slow))
        tensors = tensors_of(given)
        if key not in self._programs:
            buffers = self._inputs.of(tensors)
            _copy(buffers, tensors)
            self._programs[key] = self._make(function, plan, with_tensors(given, buffers), slow)
            self.made += 1
        program = self._programs[key]
        _copy(tensors_of(program.given), tensors)
        program.run()
        found: Found = program.found
        return found

    def keep(self, found: Found) -> Found:
        """A copy of what the next pass would overwrite."""
        return map_tensors(torch.clone, found)

    def start_gradients(self, slow: list[Tensor]) -> None:
        """Sums start at zero, at the addresses of the sweep before."""
        if not self._totals:
            self._totals = [torch.empty_like(x, requires_grad=False) for x in slow]
        for leaf, total in zip(slow, self._totals, strict=True):
            leaf.grad = total.zero_()

    def gradients(self, slow: list[Tensor]) -> list[Tensor]:
        """Copies, as the next sweep sums in the same place."""
        return [total.clone() for total in self._totals]

    def _forget_moved(self, suffix: Suffix) -> None:
        addresses = [slot.tensor.data_ptr() for slot in suffix.slots]
        if addresses != self._addresses:
            self._programs.clear()
            self._addresses = addresses

    def _make(
        self, function: Pass[Plan, Given, Found], plan: Plan, given: Given, slow: list[Tensor]
    ) -> Program:
        weights = plan.suffix.detached()

        def once(totals: list[Tensor | None]) -> Found:
            """The pass on the slow weights where they lay; fresh leaves belong to its stream."""
            leaves = [w.detach().requires_grad_() for w in weights] if slow else []
            for leaf, total in zip(leaves, totals, strict=True):
                leaf.grad = total
            with substituted(plan.suffix.slots, weights):
                return function(plan, given, leaves)

        aside: list[Tensor | None] = [None] * len(slow)
        totals: list[Tensor | None] = [*self._totals] if slow else []
        on_cuda = any(x.is_cuda for x in tensors_of(given))
        example = _warmed_up(lambda: once(aside)) if on_cuda else once(aside)
        found = with_tensors(example, self._outputs.of(tensors_of(example)))

        def run() -> None:
            _copy(tensors_of(found), tensors_of(once(totals)))

        return Program(given, found, self._captured(run) if on_cuda else run)

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as a graph's replay. Graphs share the memory of what lives within a run."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on talking to the device: those of NCCL, of asynchronous saves.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


def _warmed_up(once: Callable[[], Found]) -> Found:
    """What the last of some runs finds, on a stream of their own as a capture wants it."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            found = once()
    main.wait_stream(side)
    return found


def _copy(to: list[Tensor], tensors: list[Tensor]) -> None:
    """Copies; those that lie alike in as few kernels as there are dtypes."""
    alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(to, tensors, strict=True):
        if source.is_contiguous() and not source.is_complex():
            targets, sources = alike.setdefault(source.dtype, ([], []))
            targets.append(target)
            sources.append(source)
        else:
            target.copy_(source)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)
