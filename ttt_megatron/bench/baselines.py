"""What PyTorch has of its own, called as its users would."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import ttt_kernels
from ttt_kernels.swa_attention.reference import swa_attention_reference
from ttt_megatron.bench.attention_shape import AttentionShape

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
ON_CPU = "torch.compile is measured on a GPU alone"


Past = tuple[Tensor, Tensor] | tuple[None, None]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By torch.compile, afresh, for the shapes it is called with."""
    torch._dynamo.reset()
    made: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    return made


def _with_past(q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor, Tensor]:
    """[b, n, T, d] views, cached keys and values before the own ones."""
    if past[0] is not None and past[1] is not None:
        k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def window_mask(length: int, past: int, window: int, device: torch.device) -> Tensor:
    """True where a query sees a key: [T, P + T]."""
    key = torch.arange(past + length, device=device)
    query = key[past:].unsqueeze(1)
    return (key <= query) & (key > query - window)


def sdpa_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> Tensor:
    """SDPA's plain backend, the only one that autograd differentiates twice."""
    past: Past = (None, None) if past_k is None or past_v is None else (past_k, past_v)
    mask = window_mask(
        q.shape[1], 0 if past_k is None else past_k.shape[1], window, torch.device(q.device)
    )
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*_with_past(q, k, v, past), attn_mask=mask)
    return out.transpose(1, 2)


def first_order(
    shape: AttentionShape, past: Past, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | str]:
    """Attention by name, or why there is none. SDPA's fast backends know no window: where it hides
    keys, or keys are cached, they visit all keys before a query, or take a mask."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | str] = {}

    def sdpa(backend: SDPBackend | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        mask: Any = None
        if shape.past:
            mask = causal_lower_right(shape.length, shape.past + shape.length)
            if backend is None:
                mask = window_mask(shape.length, shape.past, shape.window, device)
        elif not shape.sees_all and backend is None:
            mask = window_mask(shape.length, 0, shape.window, device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            settings: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None}
            heads = _with_past(q, k, v, past)
            if backend is None:
                return F.scaled_dot_product_attention(*heads, **settings).transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads, **settings).transpose(1, 2)

        return attend

    if device.type == "cuda":
        if dtype in (torch.bfloat16, torch.float16):
            found["SDPA flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
            if not shape.past:
                found["SDPA cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION)
        else:
            found["SDPA flash"] = "it takes bf16 and fp16 alone"
        if shape.past or shape.length <= 4096:
            by_inductor = compiled(swa_attention_reference)

            def by_compiler(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                result: Tensor = by_inductor(q, k, v, shape.window, *past)
                return result

            found["torch.compile"] = by_compiler
    else:
        found["SDPA"] = sdpa(None)
        found["torch.compile"] = ON_CPU
    return found


@contextmanager
def full_attention_by_sdpa() -> Iterator[None]:
    """Within this context models attend by whichever backend of SDPA PyTorch chooses.

    Only models whose attention is full, read at once: another one's raises ValueError.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, window: int | None, past_k: Any = None, past_v: Any = None
    ) -> Tensor:
        if past_k is not None or (window is not None and window < q.shape[1]):
            raise ValueError("SDPA's fast backends know neither windows nor cached keys")
        heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = q.shape[2] != k.shape[2]
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)

    ours = ttt_kernels.swa_attention
    ttt_kernels.swa_attention = attend
    try:
        yield
    finally:
        ttt_kernels.swa_attention = ours
