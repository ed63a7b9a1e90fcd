"""Sliding-window attention and TTT-KVB in one mixer: near tokens exactly, far ones as learnt."""

import torch
from torch import Tensor, nn

from ttt_megatron.baselines.ttt_kvb import TTTKVB
from ttt_megatron.baselines.ttt_kvb_state import SWATTTKVBState, TTTKVBState
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.attention import KV, SelfAttention
from ttt_megatron.model.slots import Slots


class SWATTTKVB(nn.Module):
    """Sliding-window attention, and TTT-KVB as a further residual sublayer after it.

    a = attention(x);  out = a + TTT-KVB(norm(x + a)). Raises as `TTTKVB` does.
    """

    def __init__(self, config: ModelConfig, slots: Slots) -> None:
        super().__init__()
        self.window = config.window_size
        self.attention = SelfAttention(config, slots, config.window_size)
        self.ttt_norm = slots.norm(config.hidden_size, config.norm_eps)
        self.ttt = TTTKVB(config, slots)

    def forward(
        self, x: Tensor, rotation: Tensor, past: SWATTTKVBState | None
    ) -> tuple[Tensor, SWATTTKVBState]:
        """[b, T, H] → [b, T, H], and the state after the last token; as `TTTKVB.forward`."""
        cached, inner = None, None
        if past is not None:
            cached = KV(past.k, past.v) if past.k.shape[1] else None
            inner = TTTKVBState(past.fast, past.total, past.seen)
        attended, own = self.attention(x, rotation, cached)
        out, after = self.ttt(self.ttt_norm(x + attended), rotation, inner)
        k, v = self._seen_later(cached, own)
        return attended + out, SWATTTKVBState(k, v, *after)

    def _seen_later(self, past: KV | None, own: KV) -> KV:
        """The last window − 1 keys and values, or all where there is no window."""
        both = own
        if past is not None:
            both = KV(torch.cat((past.k, own.k), 1), torch.cat((past.v, own.v), 1))
        count = both.k.shape[1]
        first = 0 if self.window is None else max(count - self.window + 1, 0)
        # Copies: a view would keep what lies before the window.
        return KV(both.k[:, first:].clone(), both.v[:, first:].clone())
