"""The reverse sweep: carry the cotangent of the fast weights back through the inner steps.

With v = ∂L/∂W_i and ĉ = ∂L/∂KV, chunk i contributes through

    S = a·l_i − lr·l̇_i + ⟨ĉ, KV_i⟩,     l̇_i along v' = (clip derivative)ᵀ v, in W only

whose ordinary gradient gives v for W_{i−1}, ĉ for the cached entries, and the chunk's share of
every other gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ttt_kernels
from ttt_kernels import WeightGradients
from ttt_megatron.meta import inner_step
from ttt_megatron.meta.forward_sweep import ChunkHistory
from ttt_megatron.meta.pair import MovingWeight, Pair
from ttt_megatron.meta.problem import Problem
from ttt_megatron.meta.substitute import substituted
from ttt_megatron.meta.suffix_kv import ChunkCache, SuffixKV, gradients
from ttt_megatron.meta.tape import Playback
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


@dataclass
class ChunkGraph:
    """The graph of one chunk's S, up to its cotangents ĉ."""

    root: Tensor
    own: list[KV]
    nll: Tensor | None
    x: Tensor
    fast: list[Tensor]
    past: list[KV | None]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def slow_leaves(problem: Problem, put_off: WeightGradients | None = None) -> list[Tensor]:
    """Fresh leaves for the suffix's slow weights; with `put_off`, their stand-ins there."""
    make = _leaf if put_off is None else put_off.stand_in
    return [make(slot.tensor) for slot in problem.slots]


def plain_graph(
    problem: Problem,
    prefix_output: Tensor,
    kv: ChunkCache,
    fast: list[Tensor],
    slow: list[Tensor],
    chunk: int,
) -> ChunkGraph:
    """S = a·l_i: where no inner step follows, or its dependence on the weights is ignored."""
    rows = problem.tokens(chunk)
    x, leaves = _leaf(prefix_output[:, rows]), [_leaf(w) for w in fast]
    past = _past_leaves(kv, rows.start)
    with torch.enable_grad(), substituted(problem.slots, slow):
        hidden, own = problem.run_suffix(chunk, x, past, inner_step.as_mlps(leaves))
        root, nll = problem.model.loss(
            problem.model.slots.head.enter(hidden),
            problem.targets[:, rows],
            problem.token_weights[:, rows] * problem.chunk_weight,
        )
    return ChunkGraph(root, own, nll, x, leaves, past)


def moving_graph(
    problem: Problem,
    prefix_output: Tensor,
    kv: ChunkCache,
    fast: list[Tensor],
    slow: list[Tensor],
    chunk: int,
    direction: list[Tensor],
    history: ChunkHistory,
    loss_scale: Tensor,
) -> ChunkGraph:
    """S with the tangent of the inner step; `loss_scale` is the cotangent of the whole loss."""
    rows = problem.tokens(chunk)
    lr = problem.settings.lr
    x, leaves = _leaf(prefix_output[:, rows]), [_leaf(w) for w in fast]
    past = _past_leaves(kv, rows.start)
    playback = Playback(history.tape, -lr)
    moving: list[Any] = [
        MovingWeight(w, v, playback) for w, v in zip(leaves, direction, strict=True)
    ]
    mlps = [FastMLP(*moving[i : i + 2]) for i in range(0, len(moving), 2)]
    weights = problem.token_weights[:, rows]
    with torch.enable_grad(), substituted(problem.slots, slow):
        hidden, own = problem.run_suffix(chunk, x, past, mlps)
        hidden = problem.model.slots.head.enter(hidden)
        assert isinstance(hidden, Pair)
        root = ttt_kernels.linear_cross_entropy_pair(
            hidden.stacked,
            problem.model.head_weight,
            problem.targets[:, rows],
            weights * (problem.chunk_weight * loss_scale),
            weights * -lr,
            history.head.adjoints[0] * -lr,
            problem.model.slots.head.shard,
        )
    return ChunkGraph(root, own, None, x, leaves, past)


def _past_leaves(kv: ChunkCache, start: int) -> list[KV | None]:
    return [None if c is None else KV(_leaf(c.k), _leaf(c.v)) for c in kv.past(start)]


def pull_back(
    problem: Problem, graph: ChunkGraph, cotangents: Cotangents, chunk: int, scale: Tensor
) -> list[Tensor]:
    """Back-propagate a chunk's graph and collect; returns ∂S/∂W_{i−1}.

    `scale` multiplies the root alone, not ⟨ĉ, KV_i⟩.
    """
    rows = problem.tokens(chunk)
    roots, seeds = [graph.root], [scale.to(graph.root.dtype)]
    for own, waiting in zip(graph.own, cotangents.kv.entries(rows.start, rows.stop), strict=False):
        roots += own
        seeds += waiting
    past = [tensor for kv in graph.past if kv is not None for tensor in kv]
    inputs = [graph.x, *graph.fast, *past, *cotangents.slow]
    torch.autograd.backward(roots, seeds, inputs=inputs)
    if graph.x.grad is not None:
        cotangents.prefix_output[:, rows] = graph.x.grad
    if past:
        cotangents.kv.add_to_past(rows.start, gradients(graph.past))
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in graph.fast]


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
    """Undo the chunk's inner step on `fast` (in place) and carry `cotangents` across it."""
    settings = problem.settings
    inner_step.undo_step_(fast, history.gradient, history.rate)
    v = cotangents.fast
    if settings.second_order:
        direction = inner_step.clip_adjoint(
            v,
            history.gradient,
            history.gradient_norm,
            settings.clip,
            problem.model.slots.sum_parts,
        )
        graph = moving_graph(
            problem,
            prefix_output,
            kv,
            fast,
            cotangents.slow,
            chunk,
            direction,
            history,
            loss_scale,
        )
        scale = torch.ones_like(loss_scale)
    else:
        graph = plain_graph(problem, prefix_output, kv, fast, cotangents.slow, chunk)
        scale = loss_scale
    for total, addition in zip(v, pull_back(problem, graph, cotangents, chunk, scale), strict=True):
        total.add_(addition)
