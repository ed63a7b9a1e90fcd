"""Causal sliding-window attention: the definition."""

import torch
from torch import Tensor

from ttt_kernels.dtypes import accumulation_dtype


def swa_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √d) v, every query seeing the `window` last keys up to its own.

    Shapes: q [b, T, n, d], k and v [b, T, n_kv, d], past_k and past_v [b, P, n_kv, d] (the keys
    just before k); result [b, T, n, d]. Scores are formed whole, in float32 or float64.
    """
    if past_k is not None and past_v is not None:
        k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
    wide = accumulation_dtype(q.dtype)
    groups = q.shape[2] // k.shape[2]
    q_bntd = q.to(wide).transpose(1, 2)
    k_bntd = k.to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    v_bntd = v.to(wide).transpose(1, 2).repeat_interleave(groups, dim=1)
    scores = q_bntd @ k_bntd.mT * q.shape[-1] ** -0.5
    key = torch.arange(k.shape[1], device=q.device)
    query = key[-q.shape[1] :].unsqueeze(1)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (probabilities @ v_bntd).transpose(1, 2).to(q.dtype)
