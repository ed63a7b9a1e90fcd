"""The meta loss as one autograd node: forward is the forward sweep, backward the reverse sweep.

To whatever surrounds it (data-parallel hooks, schedules, optimizers) a meta step is an ordinary
`loss.backward()`.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import WeightGradients, putting_off, weight_gradients
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.forward_sweep import (
    ChunkHistory,
    SweepReport,
    SweepState,
    new_report,
    read_chunk,
    step_through_chunk,
)
from ttt_megatron.meta.passes import DIRECT
from ttt_megatron.meta.problem import Problem
from ttt_megatron.meta.reverse_sweep import (
    ChunkGraph,
    Cotangents,
    plain_graph,
    pull_back,
    reverse_step,
    slow_leaves,
)
from ttt_megatron.tracing import span, until_backward_ends


@dataclass
class MetaRun:
    """One micro-batch on its way through both sweeps.

    Chunks 0 … N−2 are followed by an inner step; the last one's loss is read with the final
    weights and needs none. (Of sequences in parts, only the last part has such a chunk.) Steps
    are taken in segments; with more than one segment, only the fast weights at segment starts are
    kept, and a segment's history is made again by rerunning its forward sweep. With `put_off` the
    slow weights' gradients, all of them, are formed there later.
    """

    problem: Problem
    put_off: WeightGradients | None = None
    prefix_output: Tensor = field(init=False)
    report: SweepReport = field(init=False)
    initial: list[Tensor] = field(init=False)
    state: SweepState = field(init=False)
    starts: list[list[Tensor]] = field(default_factory=list)
    history: list[ChunkHistory] = field(default_factory=list)
    last: ChunkGraph | None = None
    slow: list[Tensor] = field(default_factory=list)

    def segments(self) -> list[range]:
        """The chunks followed by a step, cut into segments."""
        steps = self.problem.num_steps
        size = self.problem.settings.segment_chunks or max(steps, 1)
        return [range(i, min(i + size, steps)) for i in range(0, steps, size)]

    def forward(self, prefix_output: Tensor, initial: list[Tensor]) -> Tensor:
        """Run the forward sweep; returns the loss, of this part's chunks alone."""
        with span("suffix forward"):
            return self._forward(prefix_output, initial)

    def _forward(self, prefix_output: Tensor, initial: list[Tensor]) -> Tensor:
        problem = self.problem
        self.prefix_output = prefix_output.detach()
        self.initial = [w.detach() for w in initial]
        self.report = new_report(problem)
        fast = inner_step.for_sequences(self.initial, prefix_output.shape[0])
        kv = problem.new_kv()
        self.state = SweepState(fast, kv)
        problem.part.receive_state(problem.boundary(fast, kv, prefix_output))
        self.slow = slow_leaves(problem, self.put_off)
        segments = self.segments()
        for index, segment in enumerate(segments):
            is_last = index == len(segments) - 1
            if not is_last:
                self.starts.append([w.clone() for w in self.state.fast])
            self._run_segment(segment, record=is_last)
        if problem.part.is_last:
            self._read_last_chunk()
        problem.part.send_state(problem.boundary(fast, kv, prefix_output, after=True))
        weighted = (self.report.token_nll * problem.token_weights).sum()
        return weighted * problem.chunk_weight

    def _run_segment(self, segment: range, record: bool) -> None:
        for chunk in segment:
            kept = step_through_chunk(
                self.problem, self.prefix_output, self.state, self.report, chunk, record
            )
            if kept is not None:
                self.history.append(kept)

    def _read_last_chunk(self) -> None:
        """The last chunk's graph is built at once: nothing but its cotangent is missing."""
        problem, chunk = self.problem, self.problem.num_chunks - 1
        reading = problem.reading(self.prefix_output, self.state.kv, self.state.fast, chunk)
        weighted = replace(reading, token_weights=reading.token_weights * problem.chunk_weight)
        self.last = plain_graph(problem.suffix, weighted, self.slow)
        assert self.last.nll is not None
        self.report.token_nll[:, problem.tokens(chunk)] = self.last.nll

    def backward(self, loss_scale: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run the reverse sweep: gradients of prefix output, slow weights, initial fast weights.

        `loss_scale` is the cotangent of the loss, a scalar. The slow weights' are none where they
        are put off.
        """
        with putting_off(self.put_off):
            return self._backward(loss_scale)

    def _backward(self, loss_scale: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        problem = self.problem
        cotangents = Cotangents(
            [], problem.new_kv(), torch.empty_like(self.prefix_output), self.slow
        )
        problem.runner.start_gradients(self.slow)
        self._start_from_the_end(cotangents, loss_scale)
        fast = self.state.fast
        for segment in reversed(self.segments()):
            if not self.history:
                fast = self._rerun(segment)
            for chunk in reversed(segment):
                reverse_step(
                    problem,
                    self.prefix_output,
                    self.state.kv,
                    fast,
                    self.history.pop(),
                    cotangents,
                    chunk,
                    loss_scale,
                )
        slow = []
        if self.put_off is None:
            slow = problem.runner.gradients(self.slow)
        self.slow = []
        return cotangents.prefix_output, slow, self._leave_at_the_start(cotangents)

    def _start_from_the_end(self, cotangents: Cotangents, loss_scale: Tensor) -> None:
        """What reaches the last step's result: from the last chunk, or from the part behind."""
        problem = self.problem
        if self.last is not None:
            graph, self.last = self.last, None
            last = problem.num_chunks - 1
            cotangents.fast = pull_back(problem, graph, cotangents, last, loss_scale)
            return
        cotangents.fast = [torch.zeros_like(w) for w in self.state.fast]
        problem.part.receive_cotangent(
            problem.boundary(cotangents.fast, cotangents.kv, self.prefix_output, after=True)
        )

    def _leave_at_the_start(self, cotangents: Cotangents) -> list[Tensor]:
        """The gradient of the initial fast weights, which the first part alone starts from."""
        problem, v = self.problem, cotangents.fast
        problem.part.send_cotangent(problem.boundary(v, cotangents.kv, self.prefix_output))
        if problem.part.is_first:
            return [x.sum(0) for x in v]
        return [torch.zeros_like(w) for w in self.initial]

    def _rerun(self, segment: range) -> list[Tensor]:
        """Make a segment's history again from its start; returns the fast weights at its end."""
        self.state.fast = self.starts.pop()
        norms, self.report.gradient_norms = self.report.gradient_norms, []
        self._run_segment(segment, record=True)
        self.report.gradient_norms = norms
        return self.state.fast


class _MetaLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: MetaRun, prefix_output: Tensor, num_slow: int, *weights: Tensor
    ) -> Tensor:
        ctx.run, ctx.num_slow = run, num_slow
        return run.forward(prefix_output, list(weights[num_slow:]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        run, ctx.run = ctx.run, None
        with span("suffix backward"):
            d_prefix, d_slow, d_fast = run.backward(d_loss)
        until_backward_ends("prefix backward")
        return None, d_prefix, None, *d_slow, *d_fast


def meta_loss(problem: Problem, prefix_output: Tensor) -> tuple[Tensor, MetaRun]:
    """The loss over all chunks, differentiable once, through every inner step.

    prefix_output [b, T, H] is the output of `LanguageModel.enter_suffix`. Gradients reach the
    suffix's parameters as outputs of one node, once a call; within `ttt_kernels.putting_off` the
    slow ones' are formed with those put off.
    """
    run = MetaRun(problem, weight_gradients())
    if run.put_off is not None and problem.runner is not DIRECT:
        raise ValueError("gradients that are put off are queued by the host: run passes directly")
    slow = [slot.tensor for slot in problem.suffix.slots] if run.put_off is None else []
    fast = inner_step.flatten(problem.model.initial_fast_weights())
    loss: Tensor = _MetaLoss.apply(run, prefix_output, len(slow), *slow, *fast)
    return loss, run


def read_sequence(
    problem: Problem,
    prefix_output: Tensor,
    *,
    final_step: bool = False,
    logits_of: tuple[int, ...] = (),
) -> tuple[SweepReport, list[Tensor]]:
    """Evaluate: read all chunks with inner steps and no outer gradient.

    A step is taken after the sequence's last chunk only if `final_step` asks for it, and never
    after a chunk that is not full. Returns the report and the fast weights at the end.
    """
    report = new_report(problem, logits_of)
    initial = inner_step.flatten(problem.model.initial_fast_weights())
    fast, kv = inner_step.for_sequences(initial, prefix_output.shape[0]), problem.new_kv()
    state = SweepState(fast, kv)
    problem.part.receive_state(problem.boundary(fast, kv, prefix_output))
    for chunk in range(problem.num_chunks):
        rows = problem.tokens(chunk)
        full = rows.stop - rows.start == problem.settings.chunk_size
        if full and (final_step or chunk < problem.num_steps):
            step_through_chunk(problem, prefix_output, state, report, chunk, record=False)
        else:
            read_chunk(problem, prefix_output, state, report, chunk)
    problem.part.send_state(problem.boundary(state.fast, kv, prefix_output, after=True))
    return report, state.fast


def default_segment(num_chunks: int) -> int:
    """The segment length at which the kept fast weights are fewest: about √N."""
    return max(1, math.isqrt(max(num_chunks - 1, 1)))
