"""Settings of the mixers that stand in attention's place. Knows no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ttt_megatron.config.setting import setting

if TYPE_CHECKING:
    from ttt_megatron.config.schema import ModelConfig

FastMLPKind = Literal["gelu", "swiglu"]
BindingLoss = Literal["squared", "dot"]
OutputRule = Literal["updated", "previous", "simplified"]
RateForm = Literal["constant", "sigmoid", "softplus"]
Positions = Literal["chunk", "absolute", "none"]


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Shapes beside the model's width; defaults are those of the paper's language models.

    (state-spaces/mamba: headdim, d_state, expand and d_conv of modules/mamba2.py, one group.)
    """

    head_dim: int = setting(64, "Channels a head of Mamba 2; divides expand times the width.")
    state_size: int = setting(128, "Rows of a head's memory.")
    expand: int = setting(2, "Channels of all heads, over the model's width.")
    conv_kernel: int = setting(4, "Tokens that the convolution before the recurrence sees.")

    def inner_size(self, model: "ModelConfig") -> int:
        """Channels of all heads."""
        return self.expand * model.hidden_size


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig:
    """Shapes beside the model's width and heads, which are model.num_heads.

    Keys are hidden_size / num_heads wide; defaults are flash-linear-attention's GatedDeltaNet's.
    """

    expand_v: int = setting(2, "Width of a value of Gated DeltaNet, over its key's.")
    conv_kernel: int = setting(4, "Tokens that the convolution before the recurrence sees.")


@dataclass(frozen=True, kw_only=True)
class TTTKVBConfig:
    """One TTT-KVB layer: its fast MLPs, what they learn, and when what they learnt is seen."""

    chunk_size: int = setting(1024, "Tokens whose gradients make one inner step.")
    num_heads: int | None = setting(
        None, "Fast MLPs, each over its share of the width; None equals model.num_heads."
    )
    fast_mlp: FastMLPKind = setting(
        "gelu", "Each head's fast MLP. gelu: two layers with biases; swiglu: no biases."
    )
    expansion: float = setting(4.0, "Hidden width of a fast MLP over its head's width.")
    loss: BindingLoss = setting(
        "squared",
        "What a step lowers, f being the fast MLP. squared: half the squared distance of "
        "k + LN(f(k)) from v; dot: the negative of ⟨f(k), v⟩, and f alone is read as well.",
    )
    output_rule: OutputRule = setting(
        "updated",
        "What a token reads. updated: f(q), the steps on its chunk's tokens so far included; "
        "previous: f(q) with the weights from before its chunk; simplified: f(k) with those, "
        "and no queries.",
    )
    rate_form: RateForm = setting(
        "sigmoid",
        "Each token's and head's inner learning rate. constant: rate; sigmoid: that "
        "times sigmoid(wx + b); "
        "softplus: softplus of wx + b, shifted to be rate at 0.",
    )
    rate: float = setting(1.0, "Inner learning rate, before it is divided by the head's width.")
    average: bool = setting(
        True, "Divide a step by the number of tokens in it, or take their gradients' sum."
    )
    clip: float = setting(
        0.0, "L2 norm a step is clipped to, per sequence and head, its rates included; 0 is off."
    )
    weight_norm: bool = setting(
        False, "After a step, scale each row of the fast matrices back to its initial norm."
    )
    positions: Positions = setting(
        "chunk",
        "What rotates queries and keys: their place in the chunk, in the sequence, or nothing.",
    )

    def heads(self, model: "ModelConfig") -> int:
        """Fast MLPs in a layer."""
        return self.num_heads or model.num_heads

    def head_dim(self, model: "ModelConfig") -> int:
        """Width of a fast MLP's input and output."""
        return model.hidden_size // self.heads(model)

    def fast_width(self, model: "ModelConfig") -> int:
        """Hidden width of a fast MLP."""
        return round(self.expansion * self.head_dim(model))

    @property
    def has_queries(self) -> bool:
        """Whether there is a projection to queries."""
        return self.output_rule != "simplified"

    @property
    def has_biases(self) -> bool:
        """Whether the fast MLPs have biases, which are fast as well."""
        return self.fast_mlp == "gelu"

    @property
    def gates(self) -> int:
        """Hidden widths that the first fast matrix puts out: gate and value, or one."""
        return 2 if self.fast_mlp == "swiglu" else 1
