"""What TTT-KVB layers hand from one run of tokens to the next: a tuple of tensors, rows first."""

from typing import NamedTuple

import torch
from torch import Tensor

from ttt_megatron.baselines.ttt_kvb_fast import FastWeights


class TTTKVBState(NamedTuple):
    """After some tokens: the fast weights, and what the unfinished chunk adds up to.

    fast [b, n, P]: the weights the chunk began with, P to a head, float32 (float64 in float64);
    total [b, n, P]: its gradients, times their rates, summed so far; seen [b] int64: its tokens.
    """

    fast: Tensor
    total: Tensor
    seen: Tensor


class SWATTTKVBState(NamedTuple):
    """The same after attention: k, v [b, ≤ window − 1, n_kv, d] are what its window still sees."""

    k: Tensor
    v: Tensor
    fast: Tensor
    total: Tensor
    seen: Tensor


def pack(weights: FastWeights) -> Tensor:
    """A head's fast weights in one row: [b, n, P]."""
    return torch.cat([part.flatten(2) for part in weights if part is not None], dim=-1)


def unpack(flat: Tensor, like: FastWeights) -> FastWeights:
    """The inverse of `pack`, for weights of the shapes of `like` [n, …]; views of `flat`."""
    parts: list[Tensor | None] = []
    start = 0
    for part in like:
        if part is None:
            parts.append(None)
            continue
        size = part[0].numel()
        parts.append(flat[..., start : start + size].unflatten(-1, part.shape[1:]))
        start += size
    fc1, fc2, bias1, bias2 = parts
    assert fc1 is not None
    assert fc2 is not None
    return FastWeights(fc1, fc2, bias1, bias2)


def common_place(seen: Tensor) -> int:
    """The tokens all rows have read of their chunks; a ValueError where these differ."""
    places = set(seen.tolist())
    if len(places) != 1:
        raise ValueError(f"rows of one batch must be at one place of their chunks, not {places}")
    return int(places.pop())
