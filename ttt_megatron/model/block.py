"""One transformer block: attention, prime MLP where there is one, static MLP, each sandwiched.

x ← x + norm(sublayer(norm(x))); without model.post_norm, attention and static MLP lack the outer.
"""

from torch import Tensor, nn

from ttt_megatron.config.schema import ATTENTION_MIXERS, ModelConfig
from ttt_megatron.model import ops
from ttt_megatron.model.attention import KV, FindPast, SelfAttention
from ttt_megatron.model.mlp import MLP, FastMLP, PrimeMLP
from ttt_megatron.model.ops import Operand
from ttt_megatron.model.slots import Slots, optional_norm


class Block(nn.Module):
    """A block, whose attention and MLP parts can also be run apart.

    `kind` is what stands in attention's place (model.mixers); a ValueError for one that `slots`
    does not have.
    """

    def __init__(
        self, config: ModelConfig, slots: Slots, *, prime: bool, kind: str = "attention"
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        post_norm = optional_norm(config.post_norm, slots)
        self.attention_norm = slots.norm(width, eps)
        self.self_attention: nn.Module | None = None
        self.mixer: nn.Module | None = None
        if kind in ATTENTION_MIXERS:
            window = config.window_size if kind == "attention" else None
            self.self_attention = SelfAttention(config, slots, window)
        elif kind in slots.mixers:
            self.mixer = slots.mixers[kind](config, slots)
        else:
            raise ValueError(f"model.mixers = {config.mixers}: nothing makes the mixer {kind}")
        self.attention_post_norm = post_norm(width, eps)
        self.prime_mlp: PrimeMLP | None = None
        if prime:
            prime_width = config.prime_ffn_hidden_size or config.ffn_hidden_size
            self.prime_norm = slots.norm(width, eps)
            self.prime_mlp = PrimeMLP(width, prime_width, slots)
            self.prime_post_norm = slots.norm(width, eps)
        self.mlp_norm = slots.norm(width, eps)
        self.mlp = MLP(width, config.ffn_hidden_size, slots)
        self.mlp_post_norm = post_norm(width, eps)

    def attend(
        self, x: Operand, rotation: Tensor, past: KV | FindPast | None
    ) -> tuple[Operand, KV]:
        """The attention part: [b, T, H] → [b, T, H], and the tokens' keys and values.

        Of another mixer, its state after the tokens; `past` is then the one before them.
        """
        mix = self.self_attention if self.mixer is None else self.mixer
        assert mix is not None
        out, kv = mix(self.attention_norm(x), rotation, past)
        return ops.add(x, self.attention_post_norm(out)), kv

    def feed_forward(self, x: Operand, fast: FastMLP | None) -> Operand:
        """The MLP parts, the prime MLP with the given fast weights: [b, T, H] → [b, T, H]."""
        if self.prime_mlp is not None:
            out = self.prime_mlp(self.prime_norm(x), fast)
            x = ops.add(x, self.prime_post_norm(out))
        return ops.add(x, self.mlp_post_norm(self.mlp(self.mlp_norm(x))))

    def forward(
        self,
        x: Operand,
        rotation: Tensor,
        past: KV | FindPast | None = None,
        fast: FastMLP | None = None,
    ) -> tuple[Operand, KV]:
        """The whole block: [b, T, H] → [b, T, H], and the tokens' keys and values."""
        x, kv = self.attend(x, rotation, past)
        return self.feed_forward(x, fast), kv
