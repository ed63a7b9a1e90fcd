"""What the chunked forms of both recurrences share: cutting into chunks, decays within one."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64
"""Tokens that are multiplied out together; the recurrence goes from chunk to chunk."""


def in_chunks(x: Tensor, size: int) -> Tensor:
    """[b, T, …] → [b, ⌈T / size⌉, size, …], zeros after the last token."""
    padding = -x.shape[1] % size
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
    return x.unflatten(1, (-1, size))


def pairwise_decay(log_decay: Tensor) -> Tensor:
    """The decay from token j to token i, 0 where j comes after i: [..., l] → [..., l (i), l (j)].

    log_decay is summed from the chunk's start, token by token.
    """
    size = log_decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    # Masked before exp: a decay back in time would overflow, and its gradient be no number.
    between = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
    return between.masked_fill(later, -torch.inf).exp()
