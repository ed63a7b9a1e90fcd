"""Gated DeltaNet (arXiv 2412.06464) in attention's place, computed as Qwen3-Next computes it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_megatron.baselines.gated_delta_rule import DeltaRule, gated_delta_rule
from ttt_megatron.baselines.short_convolution import ShortConvolution
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.decay import undecayed
from ttt_megatron.model.slots import Slots

_L2_EPS = 1e-6
"""Inside the root that queries and keys are divided by (flash-linear-attention's, Qwen3-Next's)."""


class GatedDeltaState(NamedTuple):
    """All that later tokens need of earlier ones.

    inputs [b, conv_kernel − 1, heads·(2 k + v)] are the convolution's last ones, in the compute
    dtype; memory [b, heads, k, v] is float32 (float64 in float64).
    """

    inputs: Tensor
    memory: Tensor


class GatedDeltaNet(nn.Module):
    """A decaying memory of values by key, corrected token by token; queries and keys L2-normalised.

    Parameters beside the linear maps, the convolution and the norm: A_log and dt_bias [heads].
    `rule` is what runs the recurrence. Raises ValueError where slots cut layers into parts.
    """

    def __init__(self, config: ModelConfig, slots: Slots) -> None:
        super().__init__()
        if slots.parts != 1:
            raise ValueError(f"Gated DeltaNet is not cut into parts, and there are {slots.parts}")
        settings = config.gated_delta
        self.heads = config.num_heads
        self.key_dim = config.hidden_size // config.num_heads
        self.value_dim = settings.expand_v * self.key_dim
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        # Columns: the convolution's channels (queries, keys, values), the gate, beta, the decay.
        self._channels = [keys, keys, values]
        self._columns = [2 * keys + values, values, self.heads, self.heads]
        self.linear_in = slots.column(config.hidden_size, sum(self._columns))
        self.convolution = ShortConvolution(sum(self._channels), settings.conv_kernel, bias=False)
        self.A_log = undecayed(torch.empty(self.heads))
        self.dt_bias = undecayed(torch.empty(self.heads))
        self.output_norm = slots.norm(self.value_dim, config.norm_eps)
        self.linear_out = slots.row(values, config.hidden_size)
        self.rule: DeltaRule = gated_delta_rule

    def forward(
        self, x: Tensor, rotation: Tensor, past: GatedDeltaState | None
    ) -> tuple[Tensor, GatedDeltaState]:
        """[b, T, H] → [b, T, H], and the state after the last token.

        past is the state before the first one, None where nothing was read; rotation is not used.
        Decays and memory are float32 at least.
        """
        inputs, memory = past if past is not None else (None, None)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mixed, gate, beta, decay = self.linear_in(x).split(self._columns, dim=-1)
        mixed, inputs = self.convolution(mixed, inputs)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1))
            for part in mixed.to(dtype).split(self._channels, dim=-1)
        )
        q, k = l2_normalised(q) * self.key_dim**-0.5, l2_normalised(k)
        log_decay = -self.A_log.to(dtype).exp() * F.softplus(decay.to(dtype) + self.dt_bias)
        out, memory = self.rule(q, k, v, log_decay, beta.to(dtype).sigmoid(), memory)
        gate = F.silu(gate.to(dtype)).unflatten(-1, (self.heads, -1))
        gated = self.output_norm(out.to(x.dtype)) * gate
        return self.linear_out(gated.to(x.dtype).flatten(-2)), GatedDeltaState(inputs, memory)


def l2_normalised(x: Tensor) -> Tensor:
    """The last axis at length 1, or less where it is about as short as the root of 1e-6."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)
