"""The forward sweep: read the chunks in order, stepping the fast weights after each.

Slow weights, prefix output and cached keys and values are constants here; only the fast weights'
own gradients are formed, each within its chunk.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttt_megatron.meta import inner_step
from ttt_megatron.meta.problem import Problem
from ttt_megatron.meta.substitute import substituted
from ttt_megatron.meta.suffix_kv import ChunkCache
from ttt_megatron.meta.tape import Entry, Recorded, Tape, keep_adjoint


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
    rows = problem.tokens(chunk)
    with torch.no_grad(), substituted(problem.slots, detached(problem)):
        hidden, own = problem.run_suffix(
            chunk, prefix_output[:, rows], state.kv.past(rows.start), inner_step.as_mlps(state.fast)
        )
        if chunk in report.logits:
            report.logits[chunk] = problem.model.logits(hidden)
        hidden = problem.model.slots.head.enter(hidden)
        targets, weights = problem.targets[:, rows], problem.token_weights[:, rows]
        _, nll = problem.model.loss(hidden, targets, weights)
    state.kv.write(rows.start, own)
    report.token_nll[:, rows] = nll


def detached(problem: Problem) -> list[Tensor]:
    """The suffix's slow weights as constants."""
    return [slot.tensor.detach() for slot in problem.slots]


def step_through_chunk(
    problem: Problem,
    prefix_output: Tensor,
    state: SweepState,
    report: SweepReport,
    chunk: int,
    record: bool,
) -> ChunkHistory | None:
    """Read a chunk and take the inner step on its loss; `state` moves on to the next chunk."""
    settings, rows = problem.settings, problem.tokens(chunk)
    leaves = [w.detach().requires_grad_() for w in state.fast]
    tape = Tape(settings.policy) if record and settings.policy != "recompute" else None
    head = Entry()
    with torch.enable_grad(), substituted(problem.slots, detached(problem)):
        x = prefix_output[:, rows]
        hidden, own = problem.run_suffix(
            chunk,
            x if tape is None else Recorded(x, tape),
            state.kv.past(rows.start),
            inner_step.as_mlps(leaves),
        )
        hidden = hidden.value if isinstance(hidden, Recorded) else hidden
        if chunk in report.logits:
            report.logits[chunk] = problem.model.logits(hidden.detach())
        hidden = problem.model.slots.head.enter(hidden)
        loss, nll = problem.model.loss(
            keep_adjoint(hidden, head) if record else hidden,
            problem.targets[:, rows],
            problem.token_weights[:, rows],
        )
    gradient = list(torch.autograd.grad(loss, leaves))
    gradient_norm = inner_step.norm(gradient, problem.model.slots.sum_parts)
    rate = settings.lr * inner_step.clip_factor(gradient_norm, settings.clip)
    inner_step.step_(state.fast, gradient, rate)
    state.kv.write(rows.start, own)
    report.token_nll[:, rows] = nll
    report.gradient_norms.append(gradient_norm)
    return ChunkHistory(gradient, gradient_norm, rate, head, tape) if record else None


def new_report(problem: Problem, logits_of: tuple[int, ...] = ()) -> SweepReport:
    """An empty report; the logits of the chunks asked for are kept."""
    nll = problem.token_weights.new_zeros(problem.targets.shape)
    return SweepReport(nll, logits=dict.fromkeys(logits_of, nll))
