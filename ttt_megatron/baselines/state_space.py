"""Mamba 2's state space (arXiv 2405.21060): its definition, and the same in matrix products.

    S_t = exp(a_t) S_{t−1} + b_t x_tᵀ        y_t = S_tᵀ c_t

for every head, with b and c shared by all heads. Letters of the shapes: b batch, T tokens, h heads,
p head_dim, n state size, N chunks, l tokens of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ttt_megatron.baselines.chunks import CHUNK_SIZE, in_chunks, pairwise_decay

StateSpace = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(c, b [b, T, n], x [b, T, h, p], log_decay a [b, T, h], state [b, h, n, p] or None for zeros) →
(y [b, T, h, p], the state after the last token). All of one dtype, float32 or float64."""


def state_space_reference(
    c: Tensor, b: Tensor, x: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; shapes as in `StateSpace`."""
    state = _start(b, x) if state is None else state
    out = []
    for t in range(x.shape[1]):
        written = b[:, t, None, :, None] * x[:, t, :, None, :]
        state = log_decay[:, t, :, None, None].exp() * state + written
        out.append((state * c[:, t, None, :, None]).sum(-2))
    return torch.stack(out, dim=1), state


def state_space(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The same in matrix products, chunk by chunk; shapes as in `StateSpace`.

    What tokens of a chunk do to each other is masked attention; the state passes between chunks.
    """
    state = _start(b, x) if state is None else state
    length, heads, head_dim = x.shape[1:]
    size = min(chunk_size, length)
    c, b, x = in_chunks(c, size), in_chunks(b, size), in_chunks(x, size)
    decay = in_chunks(log_decay, size).cumsum(2)  # [b, N, l, h]

    # All heads at once: [n, l] products with [l, h·p] spare a copy of b and c for every head.
    to_end = (decay[:, :, -1:] - decay).exp()
    written = b.mT @ (x * to_end.unsqueeze(-1)).flatten(-2)
    written = written.unflatten(-1, (heads, head_dim))  # [b, N, n, h, p]
    entering = []
    state = state.transpose(1, 2)
    for update, kept in zip(written.unbind(1), decay[:, :, -1].exp().unbind(1), strict=True):
        entering.append(state)
        state = state * kept[:, None, :, None] + update
    read = c @ torch.stack(entering, dim=1).flatten(-2)
    out = read.unflatten(-1, (heads, head_dim)) * decay.exp().unsqueeze(-1)

    scores = (c @ b.mT).unsqueeze(2) * pairwise_decay(decay.transpose(2, 3))  # [b, N, h, l, l]
    out = out + (scores @ x.transpose(2, 3)).transpose(2, 3)
    return out.flatten(1, 2)[:, :length], state.transpose(1, 2)


def _start(b: Tensor, x: Tensor) -> Tensor:
    return x.new_zeros(len(x), x.shape[2], b.shape[-1], x.shape[-1])
