"""Self-attention with rotary positions, its queries and keys normalised first (model.qk_norm)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model import ops
from ttt_megatron.model.ops import Operand
from ttt_megatron.model.slots import Slots, optional_norm


class KV(NamedTuple):
    """Keys (normalised and rotated) and values of a run of tokens: [b, T, n_kv, d] each."""

    k: Tensor
    v: Tensor


FindPast = Callable[[KV], tuple[KV, KV | None]]
"""From a run's own keys and values to these and those of the tokens just before the run.

The own ones are to be used as returned: gradients of whoever else sees them may join there.
"""


class SelfAttention(nn.Module):
    """Causal (windowed) self-attention; queries and keys RMS-normalised per head, then rotated.

    Without model.qk_norm they are rotated as they are.
    """

    def __init__(self, config: ModelConfig, slots: Slots, window: int | None) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_heads
        num_kv_heads = config.num_kv_heads or config.num_heads
        self.num_kv_heads = num_kv_heads // slots.parts
        self.window = window
        columns = (config.num_heads + 2 * num_kv_heads) * self.head_dim
        self.linear_qkv = slots.column(config.hidden_size, columns)
        norm = optional_norm(config.qk_norm, slots)
        self.q_layernorm = norm(self.head_dim, config.norm_eps)
        self.k_layernorm = norm(self.head_dim, config.norm_eps)
        self.linear_proj = slots.row(config.num_heads * self.head_dim, config.hidden_size)

    def forward(
        self, x: Operand, rotation: Tensor, past: KV | FindPast | None
    ) -> tuple[Operand, KV]:
        """[b, T, H] → [b, T, H], and the tokens' own keys and values.

        rotation [T, d/2] holds the tokens' angles; past the keys and values just before them, or
        how to find them.
        """
        q, k, v = ops.split_heads(
            self.linear_qkv(x), num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )
        q = ops.rope(self.q_layernorm(q), rotation)
        k = ops.rope(self.k_layernorm(k), rotation)
        if callable(past):
            (k, v), past = past(KV(k, v))
        past_k, past_v = past if past is not None else (None, None)
        out = ops.attention(q, k, v, past_k, past_v, window=self.window)
        return self.linear_proj(ops.merge_heads(out)), KV(ops.primal(k), ops.primal(v))
