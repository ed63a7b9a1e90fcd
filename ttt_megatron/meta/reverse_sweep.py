"""The reverse sweep: carry the cotangent of the fast weights back through the inner steps.

With v = ∂L/∂W_i and ĉ = ∂L/∂KV, chunk i contributes through

    S = a·l_i − lr·l̇_i + ⟨ĉ, KV_i⟩,     l̇_i along v' = (clip derivative)ᵀ v, in W only

whose ordinary gradient gives v for W_{i−1}, ĉ for the cached entries, and the chunk's share of
every other gradient.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ttt_kernels
from ttt_kernels import WeightGradients
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.chunk import Reading, Suffix
from ttt_megatron.meta.forward_sweep import ChunkHistory
from ttt_megatron.meta.pair import MovingWeight, Pair
from ttt_megatron.meta.problem import Problem
from ttt_megatron.meta.suffix_kv import ChunkCache, SuffixKV, gradients
from ttt_megatron.meta.tape import Playback, Tape
from ttt_megatron.model.attention import KV
from ttt_megatron.model.mlp import FastMLP


@dataclass
class Cotangents:
    """What the reverse sweep carries and collects.

    fast: v, one tensor [b, out, in] a fast weight, empty before anything reached it; kv: ĉ;
    prefix_output [b, T, H]; slow: leaves whose `.grad` sums the slow weights' gradients.
    """

    fast: list[Tensor]
    kv: SuffixKV
    prefix_output: Tensor
    slow: list[Tensor]


@dataclass(frozen=True)
class Moving:
    """What makes S depend on the inner step that follows the chunk.

    direction: v', one tensor [b, out, in] a fast weight; token_weights [b, C]: those of l̇. tape,
    and head for the final hidden states, hold the cotangents of tangents.
    """

    direction: list[Tensor]
    token_weights: Tensor
    head: Tensor
    tape: Tape | None


@dataclass
class ChunkGraph:
    """The graph of one chunk's S, up to its cotangents ĉ."""

    root: Tensor
    own: list[KV]
    nll: Tensor | None
    x: Tensor
    fast: list[Tensor]
    past: list[KV | None]


@dataclass(frozen=True)
class ChunkCotangents:
    """∂S by the chunk's prefix output, by what it sees before it, and by its fast weights."""

    x: Tensor
    past: list[KV | None]
    fast: list[Tensor]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _leaves(past: list[KV | None]) -> list[KV | None]:
    return [None if c is None else KV(_leaf(c.k), _leaf(c.v)) for c in past]


def slow_leaves(problem: Problem, put_off: WeightGradients | None = None) -> list[Tensor]:
    """Fresh leaves for the suffix's slow weights; with `put_off`, their stand-ins there."""
    make = _leaf if put_off is None else put_off.stand_in
    return [make(slot.tensor) for slot in problem.suffix.slots]


def plain_graph(suffix: Suffix, reading: Reading, slow: list[Tensor]) -> ChunkGraph:
    """S = a·l_i: where no inner step follows, or its dependence on the weights is ignored."""
    model = suffix.model
    x, leaves, past = _leaf(reading.x), [_leaf(w) for w in reading.fast], _leaves(reading.past)
    with torch.enable_grad(), suffix.weights(slow):
        hidden, own = suffix.run(x, reading, past, inner_step.as_mlps(leaves))
        entered = model.slots.head.enter(hidden)
        root, nll = model.loss(entered, reading.targets, reading.token_weights)
    return ChunkGraph(root, own, nll, x, leaves, past)


def moving_graph(
    suffix: Suffix, reading: Reading, moving: Moving, slow: list[Tensor]
) -> ChunkGraph:
    """S with the tangent of the inner step."""
    model, playback = suffix.model, Playback(moving.tape)
    x, leaves, past = _leaf(reading.x), [_leaf(w) for w in reading.fast], _leaves(reading.past)
    weights: list[Any] = [
        MovingWeight(w, v, playback) for w, v in zip(leaves, moving.direction, strict=True)
    ]
    mlps = [FastMLP(*weights[i : i + 2]) for i in range(0, len(weights), 2)]
    with torch.enable_grad(), suffix.weights(slow):
        hidden, own = suffix.run(x, reading, past, mlps)
        hidden = model.slots.head.enter(hidden)
        assert isinstance(hidden, Pair)
        root = ttt_kernels.linear_cross_entropy_pair(
            hidden.stacked,
            model.head_weight,
            reading.targets,
            reading.token_weights,
            moving.token_weights,
            moving.head,
            model.slots.head.shard,
        )
    return ChunkGraph(root, own, None, x, leaves, past)


def differentiate(
    graph: ChunkGraph, waiting: list[KV], slow: list[Tensor], scale: Tensor | None = None
) -> ChunkCotangents:
    """Back-propagate a chunk's graph, whose own keys and values have the cotangents `waiting`.

    Slow weights' gradients are added to their leaves'. `scale` multiplies the root alone.
    """
    seed = torch.ones_like(graph.root) if scale is None else scale.to(graph.root.dtype)
    roots, seeds = [graph.root], [seed]
    for own, cotangents in zip(graph.own, waiting, strict=False):
        roots += own
        seeds += cotangents
    past = [tensor for kv in graph.past if kv is not None for tensor in kv]
    torch.autograd.backward(roots, seeds, inputs=[graph.x, *graph.fast, *past, *slow])
    x, *fast = (torch.zeros_like(w) if w.grad is None else w.grad for w in (graph.x, *graph.fast))
    return ChunkCotangents(x, gradients(graph.past), fast)


def pull_back(
    problem: Problem, graph: ChunkGraph, cotangents: Cotangents, chunk: int, scale: Tensor
) -> list[Tensor]:
    """Back-propagate the last chunk's graph and collect; returns ∂S/∂W.

    `scale` multiplies the root alone, not ⟨ĉ, KV_i⟩.
    """
    rows = problem.tokens(chunk)
    waiting = cotangents.kv.entries(rows.start, rows.stop)
    found = differentiate(graph, waiting, cotangents.slow, scale)
    _collect(problem, found, cotangents, chunk)
    return found.fast


def _collect(problem: Problem, found: ChunkCotangents, cotangents: Cotangents, chunk: int) -> None:
    rows = problem.tokens(chunk)
    cotangents.prefix_output[:, rows] = found.x
    if any(kv is not None for kv in found.past):
        cotangents.kv.add_to_past(rows.start, found.past)


@dataclass(frozen=True)
class ReturnPlan:
    """How `carry_back` runs."""

    suffix: Suffix


@dataclass(frozen=True)
class Return:
    """What `carry_back` starts from: `waiting` is ĉ of the chunk's own keys and values."""

    reading: Reading
    moving: Moving | None
    waiting: list[KV]


def carry_back(plan: ReturnPlan, given: Return, slow: list[Tensor]) -> ChunkCotangents:
    """A chunk's S and its gradients, the slow weights' in their leaves."""
    if given.moving is None:
        graph = plain_graph(plan.suffix, given.reading, slow)
    else:
        graph = moving_graph(plan.suffix, given.reading, given.moving, slow)
    return differentiate(graph, given.waiting, slow)


def reverse_step(
    problem: Problem,
    prefix_output: Tensor,
    kv: ChunkCache,
    fast: list[Tensor],
    history: ChunkHistory,
    cotangents: Cotangents,
    chunk: int,
    loss_scale: Tensor,
) -> None:
    """Undo the chunk's inner step on `fast` (in place) and carry `cotangents` across it.

    `loss_scale` is the cotangent of the whole loss.
    """
    settings, rows, v = problem.settings, problem.tokens(chunk), cotangents.fast
    inner_step.undo_step_(fast, history.gradient, history.rate)
    reading = problem.reading(prefix_output, kv, fast, chunk)
    moving = None
    if settings.second_order:
        direction = inner_step.clip_adjoint(
            v,
            history.gradient,
            history.gradient_norm,
            settings.clip,
            problem.model.slots.sum_parts,
        )
        scale_adjoints_(history, -settings.lr)
        weights, head = reading.token_weights * -settings.lr, history.head.adjoints[0]
        moving = Moving(direction, weights, head, history.tape)
    scaled = reading.token_weights * (problem.chunk_weight * loss_scale)
    given = Return(
        replace(reading, token_weights=scaled),
        moving,
        cotangents.kv.entries(rows.start, rows.stop),
    )
    plan = ReturnPlan(problem.suffix)
    found = problem.runner.run(carry_back, plan, given, cotangents.slow)
    _collect(problem, found, cotangents, chunk)
    for total, addition in zip(v, found.fast, strict=True):
        total.add_(addition)


def scale_adjoints_(history: ChunkHistory, factor: float) -> None:
    """Turn the adjoints of values, in place, into the cotangents of these values' tangents."""
    entries = [history.head, *(history.tape.entries if history.tape is not None else [])]
    torch._foreach_mul_([x for entry in entries for x in entry.adjoints.values()], factor)
