"""What the arguments of attention must fulfil, on every device."""

import torch
from torch import Tensor

from ttt_kernels.arguments import check_floats, check_shape
from ttt_kernels.swa_attention.triton_tiles import LARGEST_WIDTH
from ttt_kernels.triton_launch import suits_triton

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    leading: int = 0,
) -> None:
    """Raise ValueError or TypeError with one sentence unless the arguments fit together.

    q, k and v have `leading` axes before [b, T, n, d]; past_k and past_v have none.
    """
    if (past_k is None) != (past_v is None):
        raise ValueError("past_k and past_v go together: give both or neither.")
    named = {"q": q, "k": k, "v": v}
    past = {} if past_k is None or past_v is None else {"past_k": past_k, "past_v": past_v}
    _check_kinds({**named, **past})
    for name, x in {**named, **past}.items():
        axes = 4 + (leading if name in named else 0)
        if x.dim() != axes:
            raise ValueError(f"{name} must have {axes} axes, and its shape is {tuple(x.shape)}.")
    if leading and not all(x.shape[0] == 2 for x in named.values()):
        raise ValueError("A pair's first axis holds the value and the tangent: its length is 2.")
    _check_shapes(q, k, v, past)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window must be an integer or None, and is {window!r}.")
    if window is not None and window < 1:
        raise ValueError(
            f"window must be 1 or more, for a query sees its own key, and is {window}."
        )


def check_reused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: tuple[Tensor, Tensor] | None,
    known: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Raise ValueError or TypeError unless what a pair pass reuses fits its q, k and v.

    saved is (output, log-sum-exp), known the cotangents of the tangents of q, k and v.
    """
    if saved is not None:
        named = dict(zip(("saved.out", "saved.lse"), saved, strict=True))
        check_floats(q=q, **named)
        b, length, heads, _ = q.shape[1:]
        kv_heads = k.shape[3]
        check_shape("saved.out", saved[0], q.shape[1:])
        check_shape("saved.lse", saved[1], (b, kv_heads, heads // kv_heads, length, 1))
    if known is not None:
        named = dict(zip(("known.q", "known.k", "known.v"), known, strict=True))
        check_floats(q=q, **named)
        for (name, x), like in zip(named.items(), (q, k, v), strict=True):
            check_shape(name, x, like.shape[1:])


def _check_kinds(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, and is a {type(x).__name__}.")
    q = tensors["q"]
    if q.dtype not in _DTYPES:
        raise TypeError(f"Attention takes float64, float32, bfloat16 and float16, not {q.dtype}.")
    for name, x in tensors.items():
        if x.dtype != q.dtype:
            raise TypeError(f"All must have one dtype: q has {q.dtype}, {name} has {x.dtype}.")
        if x.device != q.device:
            raise ValueError(
                f"All must be on one device: q is on {q.device}, {name} on {x.device}."
            )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, past: dict[str, Tensor]) -> None:
    b, length, heads, head_dim = q.shape[-4:]
    kv_heads = k.shape[-2]
    if k.shape != v.shape:
        raise ValueError(f"k and v differ in shape: {tuple(k.shape)} and {tuple(v.shape)}.")
    if k.shape[-1] != head_dim:
        raise ValueError(f"Head dims differ: q has {head_dim}, k and v have {k.shape[-1]}.")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"k's and v's {kv_heads} heads must divide q's {heads}.")
    if tuple(k.shape[-4:-2]) != (b, length):
        raise ValueError(
            f"q has {b} sequences of {length} tokens, k and v have"
            f" {k.shape[-4]} of {k.shape[-3]}: keys before the queries' go into past_k and past_v."
        )
    for name, x in past.items():
        if (x.shape[0], *x.shape[2:]) != (b, kv_heads, head_dim):
            expected = f"[{b}, P, {kv_heads}, {head_dim}]"
            raise ValueError(f"{name} must be {expected}, and its shape is {tuple(x.shape)}.")
    lengths = {x.shape[1] for x in past.values()}
    if len(lengths) > 1:
        raise ValueError("past_k and past_v must hold the same number of keys.")
    if q.is_cuda and suits_triton(q) and head_dim > LARGEST_WIDTH:
        raise ValueError(f"On CUDA the head dim is at most {LARGEST_WIDTH}, and is {head_dim}.")
