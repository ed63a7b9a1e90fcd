"""One chunk with a full window behind it: read, stepped on, and stepped back over."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ttt_kernels.work import Work as KernelWork
from ttt_megatron.bench import models
from ttt_megatron.bench.case import Case, Group, Missing
from ttt_megatron.bench.ceilings import Ceilings
from ttt_megatron.bench.meta_cases import GRAPHS, replayable
from ttt_megatron.bench.models import Size
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.forward_sweep import (
    ChunkHistory,
    SweepReport,
    SweepState,
    new_report,
    read_chunk,
    step_through_chunk,
)
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.problem import Problem, chunk_token_weights
from ttt_megatron.meta.reverse_sweep import Cotangents, reverse_step, slow_leaves
from ttt_megatron.planning.step_work import step_work
from ttt_megatron.planning.units import Work

READ, STEP, REVERSE = "read a chunk", "inner step", "reverse of an inner step"
# Where every chunk has a whole window behind it, and means over a sequence are those of a chunk.
_FAR_CHUNKS = 128


def inner_group(
    size: Size, precision: str, device: torch.device, rounds: int, ceilings: Ceilings
) -> Group:
    """The suffix over one chunk. Ratios are to reading it without a step."""
    chunk, window = size.config.inner.chunk_size, size.config.model.window_size
    behind = 8 * chunk if window is None else -(-window // chunk) * chunk
    config = size.at(behind + 2 * chunk, precision)
    flops = step_work(config, tile=1).total.flops
    return Group(
        section="inner",
        operation="chunk of the suffix",
        shape=f"{size.name}, {chunk:,} tokens behind {behind:,}",
        precision=precision,
        build=lambda: _cases(config, behind // chunk, device),
        cold_cache=False,
        # The prefix is read once, without its graph.
        memory_bytes=models.step_bytes(
            models.with_memory(config, prefix=True, two_level=False), device
        ),
        seconds=flops / ceilings.product_rate(precision) / 3,
        rounds=rounds,
        reference_name=READ,
    )


@dataclass
class _Chunk:
    """A sequence whose fast weights and cache stand before one chunk."""

    problem: Problem
    entered: Tensor
    state: SweepState
    report: SweepReport
    chunk: int

    def read(self, _: Any) -> None:
        """Losses, keys and values."""
        read_chunk(self.problem, self.entered, self.state, self.report, self.chunk)

    def step(self, record: bool = False) -> ChunkHistory | None:
        """Reads the chunk and steps; its norms are not collected, so that runs are alike."""
        self.report.gradient_norms.clear()
        return step_through_chunk(
            self.problem, self.entered, self.state, self.report, self.chunk, record
        )

    def reverse(self, prepared: tuple[ChunkHistory, Cotangents]) -> None:
        """Carries cotangents back over the step."""
        history, cotangents = prepared
        scale = torch.ones((), device=self.entered.device)
        reverse_step(
            self.problem,
            self.entered,
            self.state.kv,
            self.state.fast,
            history,
            cotangents,
            self.chunk,
            scale,
        )

    def stepped(self) -> tuple[ChunkHistory, Cotangents]:
        """A step to go back over, and cotangents that come from behind it."""
        history = self.step(record=True)
        assert history is not None
        fast = [torch.randn_like(w) * 1e-3 for w in self.state.fast]
        problem = self.problem
        slow = slow_leaves(problem)
        problem.runner.start_gradients(slow)
        kv = problem.new_kv()
        return history, Cotangents(fast, kv, torch.empty_like(self.entered), slow)


def _before(config: RunConfig, learner: Learner, chunk: int, device: torch.device) -> _Chunk:
    """With the learner's runner of passes."""
    vocabulary, length = config.model.vocab_size or 0, config.data.sequence_length
    rows = torch.randint(vocabulary, (1, length + 1), device=device)
    with torch.no_grad():
        entered = learner.run_prefix(rows[:, :-1], inner_steps=True)
    learner.begin_sweeps()
    mask = torch.ones(1, length, dtype=torch.bool, device=device)
    weights = chunk_token_weights(mask, config.inner.chunk_size)
    problem = Problem(
        model=learner.model,
        settings=learner.settings(config.inner.lr, length),
        targets=rows[:, 1:],
        token_weights=weights.to(torch.promote_types(learner.compute_dtype, torch.float32)),
        rotation=learner.model.rotations(0, length, entered),
        runner=learner.runner,
        rounded=learner.rounded,
    )
    initial = inner_step.flatten(learner.model.initial_fast_weights())
    state = SweepState(inner_step.for_sequences(initial, 1), problem.new_kv())
    found = _Chunk(problem, entered, state, new_report(problem), chunk)
    for index in range(chunk):
        step_through_chunk(problem, entered, state, found.report, index, record=False)
    return found


def _cases(config: RunConfig, chunk: int, device: torch.device) -> list[Case | Missing]:
    learner = models.make(config, device)
    weights = sum(p.nbytes for p in learner.parameters())
    work = _work(config, chunk)
    at = _before(config, learner, chunk, device)
    runs: dict[str, tuple[Any, Any]] = {READ: (at.read, _nothing), **_of(at)}
    if replayable(config, device):
        replayed = models.sharing(learner, config, graphs=True)
        steps = _of(_before(config, replayed, chunk, device))
        runs |= {f"{name}, {GRAPHS}": run for name, run in steps.items()}
    return [
        Case(
            name=name,
            run=run,
            prepare=prepare,
            tokens=config.inner.chunk_size,
            own_bytes=weights,
            work=work.get(name.removesuffix(f", {GRAPHS}")),
        )
        for name, (run, prepare) in runs.items()
    ]


def _nothing() -> None:
    """No state."""


def _of(at: _Chunk) -> dict[str, tuple[Any, Any]]:
    """What is timed of stepping, and what it needs."""
    return {STEP: (lambda _: at.step(), _nothing), REVERSE: (at.reverse, at.stepped)}


def _work(config: RunConfig, chunk: int) -> dict[str, KernelWork]:
    """The work of one chunk: what sequences differ by of which one has a chunk more.

    Within a window that is the same for every chunk far enough in; full attention's grows.
    """
    number = chunk + 1 if config.model.window_size is None else _FAR_CHUNKS

    def sweeps(chunks: int) -> dict[str, Work]:
        length = chunks * config.inner.chunk_size
        longer = replace(config, data=replace(config.data, sequence_length=length))
        work = step_work(longer, tile=1)
        reverse = work.recompute + work.suffix_backward + work.suffix_weights
        return {STEP: work.suffix_forward, REVERSE: reverse}

    less, more = sweeps(number), sweeps(number + 1)
    ones = {name: more[name] + less[name] * -1.0 for name in less}
    return {name: KernelWork(int(one.flops), int(one.traffic)) for name, one in ones.items()}
