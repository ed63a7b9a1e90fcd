"""The forward sweep: read the chunks in order, stepping the fast weights after each.

Slow weights, prefix output and cached keys and values are constants here; only the fast weights'
own gradients are formed, each within its chunk.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttt_megatron.config.schema import MemoryPolicy
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.chunk import Reading, Suffix
from ttt_megatron.meta.problem import Problem
from ttt_megatron.meta.suffix_kv import ChunkCache
from ttt_megatron.meta.tape import Entry, Recorded, Tape, keep_adjoint
from ttt_megatron.model.attention import KV


@dataclass
class ChunkHistory:
    """What the reverse sweep needs of one chunk's inner step.

    gradient: one tensor [b, out, in] a fast weight; gradient_norm and rate [b], the rate being
    the learning rate times the clip factor; head: the adjoint of the final hidden states.
    """

    gradient: list[Tensor]
    gradient_norm: Tensor
    rate: Tensor
    head: Entry
    tape: Tape | None


@dataclass
class SweepReport:
    """Figures of a forward sweep: nll [b, T] and, for every step taken, gradient norms [b]."""

    token_nll: Tensor
    gradient_norms: list[Tensor] = field(default_factory=list)
    logits: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class SweepState:
    """Where a sweep stands: the fast weights before the next chunk, and the suffix's KV."""

    fast: list[Tensor]
    kv: ChunkCache


def read_chunk(
    problem: Problem, prefix_output: Tensor, state: SweepState, report: SweepReport, chunk: int
) -> None:
    """Read a chunk without an inner step: losses, keys and values."""
    suffix, rows = problem.suffix, problem.tokens(chunk)
    reading = problem.reading(prefix_output, state.kv, state.fast, chunk)
    with torch.no_grad(), suffix.weights(suffix.detached()):
        fast = inner_step.as_mlps(reading.fast)
        hidden, own = suffix.run(reading.x, reading, reading.past, fast)
        if chunk in report.logits:
            report.logits[chunk] = problem.model.logits(hidden)
        hidden = problem.model.slots.head.enter(hidden)
        _, nll = problem.model.loss(hidden, reading.targets, reading.token_weights)
    state.kv.write(rows.start, own)
    report.token_nll[:, rows] = nll


@dataclass(frozen=True)
class GradientPlan:
    """How `chunk_gradient` runs.

    record: keep what the reverse sweep needs, by `policy`; wants_logits: form them too.
    """

    suffix: Suffix
    policy: MemoryPolicy
    record: bool
    wants_logits: bool


@dataclass(frozen=True)
class ChunkGradient:
    """A chunk's nll [b, C], its keys and values, and the gradient as in `ChunkHistory`."""

    nll: Tensor
    own: list[KV]
    gradient: list[Tensor]
    gradient_norm: Tensor
    head: Entry
    tape: Tape | None
    logits: Tensor | None


def chunk_gradient(plan: GradientPlan, reading: Reading, _: list[Tensor]) -> ChunkGradient:
    """The gradient of a chunk's loss by its fast weights, nothing else moving."""
    model = plan.suffix.model
    leaves = [w.detach().requires_grad_() for w in reading.fast]
    tape = Tape(plan.policy) if plan.record and plan.policy != "recompute" else None
    head, logits = Entry(), None
    with torch.enable_grad(), plan.suffix.weights(plan.suffix.detached()):
        x = reading.x.detach()
        hidden, own = plan.suffix.run(
            x if tape is None else Recorded(x, tape),
            reading,
            reading.past,
            inner_step.as_mlps(leaves),
        )
        hidden = hidden.value if isinstance(hidden, Recorded) else hidden
        if plan.wants_logits:
            logits = model.logits(hidden.detach())
        hidden = model.slots.head.enter(hidden)
        loss, nll = model.loss(
            keep_adjoint(hidden, head) if plan.record else hidden,
            reading.targets,
            reading.token_weights,
        )
    gradient = list(torch.autograd.grad(loss, leaves))
    gradient_norm = inner_step.norm(gradient, model.slots.sum_parts)
    own = [KV(kv.k.detach(), kv.v.detach()) for kv in own]
    return ChunkGradient(nll, own, gradient, gradient_norm, head, tape, logits)


def step_through_chunk(
    problem: Problem,
    prefix_output: Tensor,
    state: SweepState,
    report: SweepReport,
    chunk: int,
    record: bool,
) -> ChunkHistory | None:
    """Read a chunk and take the inner step on its loss; `state` moves on to the next chunk."""
    settings, rows, runner = problem.settings, problem.tokens(chunk), problem.runner
    plan = GradientPlan(problem.suffix, settings.policy, record, chunk in report.logits)
    reading = problem.reading(prefix_output, state.kv, state.fast, chunk)
    found = runner.run(chunk_gradient, plan, reading, [])
    rate = settings.lr * inner_step.clip_factor(found.gradient_norm, settings.clip)
    inner_step.step_(state.fast, found.gradient, rate)
    state.kv.write(rows.start, found.own)
    report.token_nll[:, rows] = found.nll
    if found.logits is not None:
        report.logits[chunk] = runner.keep(found.logits)
    gradient_norm = runner.keep(found.gradient_norm)
    report.gradient_norms.append(gradient_norm)
    if not record:
        return None
    gradient, head, tape = runner.keep((found.gradient, found.head, found.tape))
    return ChunkHistory(gradient, gradient_norm, rate, head, tape)


def new_report(problem: Problem, logits_of: tuple[int, ...] = ()) -> SweepReport:
    """An empty report; the logits of the chunks asked for are kept."""
    nll = problem.token_weights.new_zeros(problem.targets.shape)
    return SweepReport(nll, logits=dict.fromkeys(logits_of, nll))
