"""Reading a run of tokens of one chunk, and the inner step at the chunk's end.

All gradients of a chunk are taken at the weights W it began with, so that token t's weights are

    W_t = W − m_t c_t Σ_{s ≤ t} η_s ∂ℓ_s/∂W        m_t = 1/t (or 1),  c_t the clip factor

and a fast matrix's term of the sum is an outer product a_s i_sᵀ of a scaled adjoint and an input.
Products with W_t are therefore formed without W_t (the dual form):

    W_t x_t = W x_t − m_t c_t Σ_{s ≤ t} a_s ⟨i_s, x_t⟩

A chunk may be read in several runs: the sum over earlier ones is handed on as a matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ttt_megatron.baselines.ttt_kvb_fast import (
    Binding,
    FastWeights,
    activate,
    activation_adjoint,
    affine,
    product,
    run_fast,
)
from ttt_megatron.config.mixers import TTTKVBConfig


class Run(NamedTuple):
    """Consecutive tokens of one chunk: q, k, v [b, n, t, d], rate [b, n, t] (η)."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    rate: Tensor


class Terms(NamedTuple):
    """One layer's inputs i [b, n, t, in] and scaled adjoints a [b, n, t, out], token by token."""

    inputs: Tensor
    adjoints: Tensor


def read_run(
    run: Run,
    weights: FastWeights,
    total: FastWeights | None,
    seen: int,
    binding: Binding,
    settings: TTTKVBConfig,
) -> tuple[Tensor, FastWeights]:
    """What the tokens read [b, n, t, d], and the chunk's gradients summed up to their last.

    `weights` are those from before the chunk, `total` the sum over its `seen` earlier tokens.
    """
    kind, dtype = settings.fast_mlp, run.k.dtype
    keys = run_fast(run.k, weights, kind, dtype)
    out_adjoint = binding.adjoint(keys.out, run.k, run.v) * run.rate.unsqueeze(-1)
    hidden_adjoint = product(out_adjoint, weights.fc2, dtype)
    first = Terms(run.k, activation_adjoint(hidden_adjoint, keys.before, kind))
    second = Terms(keys.hidden, out_adjoint)
    summed = _add_terms(total, first, second, settings.has_biases, dtype)
    if run.q is None:
        return binding.read(run.k, keys.out), summed
    if settings.output_rule == "previous":
        return binding.read(run.q, run_fast(run.q, weights, kind, dtype).out), summed
    scale = _scales(first, second, total, seen, settings).unsqueeze(-1)
    moved1 = None if total is None else (total.fc1, total.bias1)
    moved2 = None if total is None else (total.fc2, total.bias2)
    before = affine(run.q, weights.fc1, weights.bias1, dtype)
    before = before - scale * _moved(run.q, first, moved1, settings.has_biases, dtype)
    hidden = activate(before, kind)
    out = affine(hidden, weights.fc2, weights.bias2, dtype)
    out = out - scale * _moved(hidden, second, moved2, settings.has_biases, dtype)
    return binding.read(run.q, out), summed


def take_step(
    weights: FastWeights,
    total: FastWeights,
    initial: FastWeights,
    settings: TTTKVBConfig,
) -> FastWeights:
    """The weights after a whole chunk; `initial` are those whose norms weight_norm keeps."""
    share = 1.0 / settings.chunk_size if settings.average else 1.0
    scale = total.fc1.new_full(total.fc1.shape[:2], share)
    if settings.clip:
        scale = scale * _clip_factor(_square(total) * share**2, settings.clip)
    matrix, vector = scale[..., None, None], scale[..., None]
    fc1 = weights.fc1 - matrix * total.fc1
    fc2 = weights.fc2 - matrix * total.fc2
    if settings.weight_norm:
        fc1, fc2 = _rescaled(fc1, initial.fc1), _rescaled(fc2, initial.fc2)
    if weights.bias1 is None or weights.bias2 is None:
        return FastWeights(fc1, fc2, None, None)
    assert total.bias1 is not None
    assert total.bias2 is not None
    bias1 = weights.bias1 - vector * total.bias1
    return FastWeights(fc1, fc2, bias1, weights.bias2 - vector * total.bias2)


def _add_terms(
    total: FastWeights | None, first: Terms, second: Terms, biases: bool, dtype: torch.dtype
) -> FastWeights:
    sums: list[Tensor | None] = [
        product(terms.adjoints.mT, terms.inputs, dtype) for terms in (first, second)
    ]
    sums += [terms.adjoints.sum(-2) if biases else None for terms in (first, second)]
    if total is not None:
        sums = [
            None if new is None or old is None else old + new
            for old, new in zip(total, sums, strict=True)
        ]
    fc1, fc2, bias1, bias2 = sums
    assert fc1 is not None
    assert fc2 is not None
    return FastWeights(fc1, fc2, bias1, bias2)


def _moved(
    x: Tensor,
    terms: Terms,
    earlier: tuple[Tensor, Tensor | None] | None,
    bias: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Σ_{s ≤ t} a_s ⟨i_s, x_t⟩ for every token t, a bias being an input that is 1."""
    likeness = product(x, terms.inputs.mT, dtype)
    if bias:
        likeness = likeness + 1
    out = product(likeness.tril(), terms.adjoints, dtype)
    return out if earlier is None else out + affine(x, earlier[0], earlier[1], dtype)


def _scales(
    first: Terms,
    second: Terms,
    total: FastWeights | None,
    seen: int,
    settings: TTTKVBConfig,
) -> Tensor:
    """m_t c_t for every token of a run: [t], or [b, n, t] where steps are clipped."""
    count = first.adjoints.shape[-2]
    share = first.adjoints.new_ones(count)
    if settings.average:
        share = share / torch.arange(seen + 1, seen + 1 + count, device=share.device)
    if not settings.clip:
        return share
    squares = _prefix_squares(first, second, total, settings.has_biases)
    return share * _clip_factor(squares * share.square(), settings.clip)


def _prefix_squares(
    first: Terms,
    second: Terms,
    total: FastWeights | None,
    bias: bool,
) -> Tensor:
    """‖Σ_{s ≤ t} η_s ∂ℓ_s/∂W‖² for every token t of a run: [b, n, t], float32 at least."""
    dtype = first.adjoints.dtype
    growth: Tensor | float = 0.0
    for terms in (first, second):
        likeness = product(terms.inputs, terms.inputs.mT, dtype) + float(bias)
        gram = likeness * product(terms.adjoints, terms.adjoints.mT, dtype)
        growth = growth + 2 * gram.tril(-1).sum(-1) + gram.diagonal(dim1=-2, dim2=-1)
    if total is not None:
        for terms, weight, shift in (
            (first, total.fc1, total.bias1),
            (second, total.fc2, total.bias2),
        ):
            earlier = affine(terms.inputs, weight, shift, dtype)
            growth = growth + 2 * (earlier * terms.adjoints).sum(-1)
    assert isinstance(growth, Tensor)
    squares = growth.cumsum(-1)
    return squares if total is None else squares + _square(total).unsqueeze(-1)


def _square(weights: FastWeights) -> Tensor:
    """‖·‖² over a head's fast weights: [b, n]."""
    parts = [part.flatten(2).square().sum(-1) for part in weights if part is not None]
    return torch.stack(parts).sum(0)


def _clip_factor(squares: Tensor, clip: float) -> Tensor:
    """min(1, clip/‖·‖); the root is taken of what is clipped alone, so that 0 has a gradient."""
    long = squares >= clip**2
    return torch.where(long, clip * torch.where(long, squares, 1.0).rsqrt(), 1.0)


def _rescaled(weight: Tensor, initial: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return weight * torch.linalg.vector_norm(initial, dim=-1, keepdim=True) / (norm + 1e-5)
