"""`swa_attention` and `swa_attention_pair`: sliding-window attention, chosen by device.

On CUDA Triton kernels run (`triton_path`), on CPU, for float64 and for float32 with head dims
beyond 64 tiles of matrix products (`torch_path`). Both visit only keys inside the window.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_kernels.mode import uses_plain_definitions
from ttt_kernels.swa_attention import torch_path
from ttt_kernels.swa_attention.checks import check_arguments, check_reused
from ttt_kernels.swa_attention.reference import swa_attention_reference
from ttt_kernels.swa_attention.triton_tiles import LARGEST_SINGLE_WIDTH, padded_width
from ttt_kernels.triton_launch import suits_triton


class SavedAttention(NamedTuple):
    """A forward pass's output [b, T, n, d] and log-sum-exp [b, n_kv, r, T, 1]."""

    out: Tensor
    lse: Tensor


class KnownAdjoints(NamedTuple):
    """Cotangents of the tangents of q, k and v, where the forward sweep has them already."""

    q: Tensor
    k: Tensor
    v: Tensor


def _runs_kernels(q: Tensor) -> bool:
    """Whether Triton kernels take this; not float32 too wide for the registers of a program."""
    wide_single = q.element_size() > 2 and padded_width(q.shape[-1]) > LARGEST_SINGLE_WIDTH
    return suits_triton(q) and not wide_single


def _kernels() -> ModuleType:
    # Importing it takes Triton, which need not be installed where no kernel runs.
    from ttt_kernels.swa_attention import triton_path

    return triton_path


class _SwaAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        kept: list[Tensor | None] = []
        if _runs_kernels(q):
            out, lse = _kernels().forward(q, k, v, past_k, past_v, window)
        else:
            out, lse, kept = torch_path.forward(q, k, v, past_k, past_v, window)
        ctx.save_for_backward(q, k, v, past_k, past_v, out, lse)
        ctx.window, ctx.kept = window, kept
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, past_k, past_v, out, lse = ctx.saved_tensors
        grads = _SwaAttentionGradient.apply(
            d_out,
            q,
            k,
            v,
            past_k,
            past_v,
            ctx.window,
            SavedAttention(out.detach(), lse),
            ctx.kept,
            ctx.needs_input_grad[3] or ctx.needs_input_grad[4],
        )
        return *grads, None


class _SwaAttentionGradient(torch.autograd.Function):
    """The gradients of attention, which can be differentiated once more."""

    @staticmethod
    def forward(
        ctx: Any,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        window: int | None,
        saved: SavedAttention,
        kept: list[Tensor | None],
        want_past: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(d_out, q, k, v, past_k, past_v, *saved)
        ctx.window, ctx.want_past = window, want_past
        arguments = (q, k, v, past_k, past_v, window, *saved, d_out, want_past)
        grads: tuple[Tensor | None, ...]
        if _runs_kernels(q):
            grads = _kernels().backward(*arguments)
        else:
            grads = torch_path.backward(*arguments, kept)
        return grads

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        d_out, q, k, v, past_k, past_v, out, lse = ctx.saved_tensors
        dot_q, dot_k, dot_v, dot_past_k, dot_past_v = tangents
        saved: SavedAttention | None = SavedAttention(out, lse)
        past = 0
        if ctx.want_past and past_k.shape[1]:
            # Pairs have no tangents of cached keys: make them own ones, of queries without effect.
            past = past_k.shape[1]
            blank = q.new_zeros(q.shape[0], past, *q.shape[2:])
            d_out, q, dot_q = (torch.cat((blank, x), dim=1) for x in (d_out, q, dot_q))
            k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
            dot_k = torch.cat((dot_past_k, dot_k), dim=1)
            dot_v = torch.cat((dot_past_v, dot_v), dim=1)
            past_k = past_v = saved = None
        pairs = [torch.stack(x).requires_grad_() for x in ((q, dot_q), (k, dot_k), (v, dot_v))]
        # The gradients along the tangents are those of attention's own tangent against d_out, whose
        # cotangents of the tangents are the gradients themselves: nobody asks for them here.
        known = KnownAdjoints(dot_q, dot_k, dot_v)
        with torch.enable_grad():
            q, k, v = pairs
            result = swa_attention_pair(q, k, v, ctx.window, past_k, past_v, saved, known)
        cotangent = torch.stack((torch.zeros_like(d_out), d_out))
        dq, dk, dv = (x[0] for x in torch.autograd.grad(result, pairs, cotangent))
        past_grads = (dk[:, :past], dv[:, :past]) if ctx.want_past else (None, None)
        own = (result[1].detach()[:, past:], dq[:, past:], dk[:, past:], dv[:, past:])
        return *own, *past_grads, None, None, None, None


def swa_attention_saved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> SavedAttention:
    """`swa_attention` together with what a later pair pass over the same inputs can reuse."""
    check_arguments(q, k, v, window, past_k, past_v)
    return SavedAttention(*_SwaAttention.apply(q, k, v, past_k, past_v, window))


def swa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> Tensor:
    """Causal attention in which a query sees the `window` last keys, its own included.

    Shapes: q [b, T, n, d], k and v [b, T, n_kv, d] (n_kv divides n), past_k and past_v
    [b, P, n_kv, d]: the keys just before k, without those no query can see. `window` None is
    full attention. Result [b, T, n, d], in q's dtype: float64, float32, bfloat16 or float16, the
    same for all. Tensors may have any strides. Twice differentiable by autograd.

    Raises ValueError or TypeError if the arguments do not fit together.
    """
    if uses_plain_definitions():
        check_arguments(q, k, v, window, past_k, past_v)
        return swa_attention_reference(q, k, v, window, past_k, past_v)
    return swa_attention_saved(q, k, v, window, past_k, past_v).out


class _SwaAttentionPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        window: int | None,
        saved: SavedAttention | None,
        known: KnownAdjoints | None,
    ) -> Tensor:
        arguments = (q, k, v, past_k, past_v, window, saved)
        ctx.window, ctx.known, ctx.kept = window, known, None
        result: Tensor
        if _runs_kernels(q):
            result, rows = _kernels().pair_forward(*arguments)
            ctx.save_for_backward(q, k, v, past_k, past_v, result, *rows)
        else:
            result, out, dot_out, ctx.kept = torch_path.pair_forward(*arguments)
            ctx.save_for_backward(q, k, v, past_k, past_v, out, dot_out)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, past_k, past_v, out, *rest = ctx.saved_tensors
        want_past = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        inputs = (q, k, v, past_k, past_v, ctx.window, out)
        if ctx.kept is None:
            rows = _kernels().Rows(*rest)
            grads = _kernels().pair_backward(*inputs, rows, cotangent, ctx.known, want_past)
        else:
            dot_out = rest[0]
            grads = torch_path.pair_backward(
                *inputs, dot_out, cotangent, ctx.known, want_past, ctx.kept
            )
        return *grads, None, None, None


def swa_attention_pair(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    saved: SavedAttention | None = None,
    known: KnownAdjoints | None = None,
) -> Tensor:
    """`swa_attention` and its directional derivative; cached keys have no tangent.

    Shapes: q [2, b, T, n, d], k and v [2, b, T, n_kv, d], past_k and past_v [b, P, n_kv, d];
    result [2, b, T, n, d]. `saved` (of the same inputs) spares recomputing the output, `known`
    the cotangents of the tangents. Raises ValueError or TypeError if the arguments do not fit
    together.
    """
    check_arguments(q, k, v, window, past_k, past_v, leading=1)
    check_reused(q, k, v, saved, known)
    result: Tensor = _SwaAttentionPair.apply(q, k, v, past_k, past_v, window, saved, known)
    return result
