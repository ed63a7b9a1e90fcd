"""Mamba 2 (arXiv 2405.21060) in attention's place, laid out as state-spaces/mamba's Mamba2."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_megatron.baselines.short_convolution import ShortConvolution
from ttt_megatron.baselines.state_space import StateSpace, state_space
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.decay import undecayed
from ttt_megatron.model.slots import Slots


class Mamba2State(NamedTuple):
    """All that later tokens need of earlier ones.

    inputs [b, conv_kernel − 1, inner + 2 state_size] are the convolution's last ones, in the
    compute dtype; memory [b, heads, state_size, head_dim] is float32 (float64 in float64).
    """

    inputs: Tensor
    memory: Tensor


class Mamba2(nn.Module):
    """A state space read and written through input-dependent vectors, gated at its end.

    Parameters beside the linear maps, the convolution and the norm: A_log, D and dt_bias [heads].
    `scan` is what runs the recurrence. Raises ValueError where slots cut layers into parts.
    """

    def __init__(self, config: ModelConfig, slots: Slots) -> None:
        super().__init__()
        if slots.parts != 1:
            raise ValueError(f"Mamba 2 is not cut into parts, and there are {slots.parts}")
        self.settings = settings = config.mamba2
        self.inner_size = settings.inner_size(config)
        self.heads = self.inner_size // settings.head_dim
        convolved = self.inner_size + 2 * settings.state_size
        # Columns: the gate, the convolution's channels (values, b, c), the heads' time steps.
        self._columns = [self.inner_size, convolved, self.heads]
        self.linear_in = slots.column(config.hidden_size, sum(self._columns))
        self.convolution = ShortConvolution(convolved, settings.conv_kernel, bias=True)
        self.A_log = undecayed(torch.empty(self.heads))
        self.D = undecayed(torch.empty(self.heads))
        self.dt_bias = undecayed(torch.empty(self.heads))
        self.output_norm = slots.norm(self.inner_size, config.norm_eps)
        self.linear_out = slots.row(self.inner_size, config.hidden_size)
        self.scan: StateSpace = state_space

    def forward(
        self, x: Tensor, rotation: Tensor, past: Mamba2State | None
    ) -> tuple[Tensor, Mamba2State]:
        """[b, T, H] → [b, T, H], and the state after the last token.

        past is the state before the first one, None where nothing was read; rotation is not used.
        Decays and memory are float32 at least.
        """
        inputs, memory = past if past is not None else (None, None)
        dtype = torch.promote_types(x.dtype, torch.float32)
        gate, mixed, dt = self.linear_in(x).split(self._columns, dim=-1)
        mixed, inputs = self.convolution(mixed, inputs)
        n = self.settings.state_size
        values, b, c = mixed.to(dtype).split([self.inner_size, n, n], dim=-1)
        values = values.unflatten(-1, (self.heads, -1))
        dt = F.softplus(dt.to(dtype) + self.dt_bias)
        log_decay = -dt * self.A_log.to(dtype).exp()
        out, memory = self.scan(c, b, values * dt.unsqueeze(-1), log_decay, memory)
        out = out + self.D.unsqueeze(-1) * values
        gated = out.flatten(-2) * F.silu(gate.to(dtype))
        return self.linear_out(self.output_norm(gated.to(x.dtype))), Mamba2State(inputs, memory)
