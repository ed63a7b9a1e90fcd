"""The maths of one block: sandwich norms, rotary attention over a window, SwiGLU MLPs.

Shapes: b rows, T tokens, H hidden size, n heads of which n_kv hold keys, d head size, I MLP width.
Every map is x @ weightᵀ with weight [out, in]; there are no biases.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_ttt_e2e import TTTE2EConfig

FastMLP = tuple[Tensor, Tensor]
"""Fast weights of one prime MLP: fc1 [b, 2I, H] (gate, then up) and fc2 [b, H, I]."""


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last axis, formed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., width], in x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)


class NoNorm(nn.Module):
    """What stands where a model has no norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x


def rotation_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of p·θ^(−2m/d) for positions [b, T]: [b, T, 1, d/2] float64 each."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions.double().unsqueeze(-1) * theta ** -(exponent / head_dim)
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn components (2m, 2m+1) of [b, T, n, d] by their angles."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(wide) for part in table)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ: [b, T, in] by [out, in], or by a weight [b, out, in] for each row."""
    weight = weight.to(x.dtype)
    return F.linear(x, weight) if weight.dim() == 2 else torch.bmm(x, weight.mT)


class Attention(nn.Module):
    """Self-attention; queries and keys are normalised per head (config.qk_norm), then rotated."""

    def __init__(self, config: TTTE2EConfig) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, width = config.head_dim, config.hidden_size
        columns = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.linear_qkv = nn.Linear(width, columns, bias=False)
        norm: type[nn.Module] = RMSNorm if config.qk_norm else NoNorm
        self.q_layernorm = norm(self.head_dim, config.rms_norm_eps)
        self.k_layernorm = norm(self.head_dim, config.rms_norm_eps)
        self.linear_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)

    def project(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, T, n, d], keys and values [b, T, n_kv, d] of [b, T, H].

        Columns are grouped by key head: its query heads, its key, its value.
        """
        grouped = linear(x, self.linear_qkv.weight).unflatten(
            -1, (self.num_kv_heads, -1, self.head_dim)
        )
        q, k, v = torch.split(grouped, [grouped.shape[-2] - 2, 1, 1], dim=-2)
        q = rotate(self.q_layernorm(q.flatten(-3, -2)), table)
        return q, rotate(self.k_layernorm(k.squeeze(-2)), table), v.squeeze(-2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Attention of [b, T, n, d] over K keys, visible [b, T, K] bool: [b, T, H]."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible.unsqueeze(1),
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return linear(out.transpose(1, 2).flatten(-2), self.linear_proj.weight)


class MLP(nn.Module):
    """silu(gate) ⊙ up, then fc2; gate and up are the halves of fc1."""

    def __init__(self, width: int, intermediate_size: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(width, 2 * intermediate_size, bias=False)
        self.linear_fc2 = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, x: Tensor, fast: FastMLP | None = None) -> Tensor:
        """[b, T, H] → [b, T, H], with the rows' own weights where they are given."""
        fc1, fc2 = fast or (self.linear_fc1.weight, self.linear_fc2.weight)
        gate, up = linear(x, fc1).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, fc2)


class Block(nn.Module):
    """Attention, the prime MLP where there is one, the MLP: x ← x + norm(sublayer(norm(x)))."""

    def __init__(self, config: TTTE2EConfig, *, prime: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(width, eps)
        self.self_attention = Attention(config)
        post_norm: type[nn.Module] = RMSNorm if config.post_norm else NoNorm
        self.attention_post_norm = post_norm(width, eps)
        self.prime_mlp: MLP | None = None
        if prime:
            self.prime_norm = RMSNorm(width, eps)
            self.prime_mlp = MLP(width, config.prime_intermediate_size)
            self.prime_post_norm = RMSNorm(width, eps)
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp = MLP(width, config.intermediate_size)
        self.mlp_post_norm = post_norm(width, eps)

    def feed_forward(self, x: Tensor, fast: FastMLP | None) -> Tensor:
        """The MLPs: [b, T, H] → [b, T, H]."""
        if self.prime_mlp is not None:
            x = x + self.prime_post_norm(self.prime_mlp(self.prime_norm(x), fast))
        out: Tensor = x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        return out


def head_adjoint(
    hidden: Tensor, head: Tensor, targets: Tensor, token_weights: Tensor, tile: int = 1 << 24
) -> Tensor:
    """The gradient of Σ token_weights·nll by hidden states [b, T, H], in tiles of tokens.

    head [V, H], targets [b, T] int64, token_weights [b, T] float32 or wider. A tile's logits have
    at most about `tile` entries.
    """
    head = head.to(hidden.dtype)
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    weights, adjoint = token_weights.flatten(), torch.empty_like(flat)
    rows = max(1, tile // head.shape[0])
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        p = (flat[part] @ head.mT).to(weights.dtype).softmax(-1)
        p.scatter_add_(1, wanted[part, None], p.new_full((len(p), 1), -1.0))
        adjoint[part] = p.mul_(weights[part, None]).to(hidden.dtype) @ head
    return adjoint.view_as(hidden)
