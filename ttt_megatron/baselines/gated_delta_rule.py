"""The gated delta rule (arXiv 2412.06464): its definition, and the same in matrix products.

    S' = exp(a_t) S_{t−1}        S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ        o_t = S_tᵀ q_t

for every head: what a decayed memory answers to a key is moved towards the value by β. Letters of
the shapes: b batch, T tokens, h heads, k and v widths of a key and a value, N chunks, l tokens of a
chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ttt_megatron.baselines.chunks import CHUNK_SIZE, in_chunks, pairwise_decay

DeltaRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(q, k [b, T, h, k], v [b, T, h, v], log_decay a and beta [b, T, h], state [b, h, k, v] or None
for zeros) → (o [b, T, h, v], the state after the last token). All of one dtype, float32 or float64.
"""


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; shapes as in `DeltaRule`."""
    state = _start(k, v) if state is None else state
    out = []
    for t in range(q.shape[1]):
        state = log_decay[:, t, :, None, None].exp() * state
        answer = (state * k[:, t].unsqueeze(-1)).sum(-2)
        correction = beta[:, t].unsqueeze(-1) * (v[:, t] - answer)
        state = state + k[:, t].unsqueeze(-1) * correction.unsqueeze(-2)
        out.append((state * q[:, t].unsqueeze(-1)).sum(-2))
    return torch.stack(out, dim=1), state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """The same in matrix products, chunk by chunk; shapes as in `DeltaRule`.

    The corrections of a chunk depend on each other through a unit triangular system. Solved once
    for the values and once for the keys (the WY form), it gives them for any entering state.
    """
    state = _start(k, v) if state is None else state
    length, size = q.shape[1], min(chunk_size, q.shape[1])
    # [b, N, h, l, …]
    q, k, v = (in_chunks(x, size).transpose(2, 3) for x in (q, k, v))
    beta = in_chunks(beta, size).transpose(2, 3).unsqueeze(-1)
    decay = in_chunks(log_decay, size).transpose(2, 3).cumsum(-1)
    between, since_start = pairwise_decay(decay), decay.exp().unsqueeze(-1)

    # Of the system, what lies on the diagonal and above is not read.
    system = (beta * k) @ k.mT * between
    wanted = torch.cat((beta * v, beta * since_start * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    to_end = k * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    entering, corrections = [], []
    for value, key, key_to_end, kept in zip(
        values.unbind(1), keys.unbind(1), to_end.unbind(1), since_start.unbind(1), strict=True
    ):
        entering.append(state)
        corrections.append(value - key @ state)
        state = state * kept[:, :, -1:] + key_to_end.mT @ corrections[-1]
    out = (q * since_start) @ torch.stack(entering, dim=1)
    out = out + ((q @ k.mT) * between) @ torch.stack(corrections, dim=1)
    return out.transpose(2, 3).flatten(1, 2)[:, :length], state


def _start(k: Tensor, v: Tensor) -> Tensor:
    return v.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1])
