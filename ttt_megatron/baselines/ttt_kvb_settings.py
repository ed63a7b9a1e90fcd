"""Settings of TTT-KVB layers, and what they cannot be."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ttt_megatron.config.schema import ModelConfig, setting
from ttt_megatron.errors import UserError

FastMLPKind = Literal["gelu", "swiglu"]
BindingLoss = Literal["squared", "dot"]
OutputRule = Literal["updated", "previous", "simplified"]
RateForm = Literal["constant", "sigmoid", "softplus"]
Positions = Literal["chunk", "absolute", "none"]


@dataclass(frozen=True, kw_only=True)
class TTTKVBSettings:
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

    def heads(self, config: ModelConfig) -> int:
        """Fast MLPs in a layer."""
        return self.num_heads or config.num_heads

    def head_dim(self, config: ModelConfig) -> int:
        """Width of a fast MLP's input and output."""
        return config.hidden_size // self.heads(config)

    def fast_width(self, config: ModelConfig) -> int:
        """Hidden width of a fast MLP."""
        return round(self.expansion * self.head_dim(config))

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


_CHOICES = {
    "fast_mlp": FastMLPKind,
    "loss": BindingLoss,
    "output_rule": OutputRule,
    "rate_form": RateForm,
    "positions": Positions,
}


def check_settings(settings: TTTKVBSettings, config: ModelConfig) -> None:
    """Raise a UserError that says which setting of a TTT-KVB layer cannot be, and why."""
    for key, choices in _CHOICES.items():
        value = getattr(settings, key)
        if value not in get_args(choices):
            known = ", ".join(get_args(choices))
            raise UserError(f"ttt_kvb.{key} = {value}: choose one of {known}.")
    if settings.chunk_size < 1:
        raise UserError(f"ttt_kvb.chunk_size = {settings.chunk_size}: a step needs a token.")
    if settings.num_heads is not None and settings.num_heads < 1:
        raise UserError(f"ttt_kvb.num_heads = {settings.num_heads}: give 1 or more, or null.")
    heads = settings.heads(config)
    if config.hidden_size % heads:
        raise UserError(
            f"ttt_kvb.num_heads = {heads}: choose a divisor of model.hidden_size = "
            f"{config.hidden_size}."
        )
    if settings.positions == "chunk" and settings.head_dim(config) % 2:
        raise UserError(
            f"ttt_kvb.positions = chunk: {heads} heads of width {settings.head_dim(config)} cannot "
            "be rotated in pairs; choose ttt_kvb.num_heads for an even width."
        )
    if settings.fast_width(config) < 1:
        raise UserError(f"ttt_kvb.expansion = {settings.expansion}: no hidden width is left.")
    if not settings.rate > 0 or not math.isfinite(settings.rate):
        raise UserError(f"ttt_kvb.rate = {settings.rate}: give a positive number.")
    if not settings.clip >= 0:
        raise UserError(f"ttt_kvb.clip = {settings.clip}: give a norm, or 0 for none.")
    if settings.weight_norm and settings.output_rule == "updated":
        raise UserError(
            "ttt_kvb.weight_norm = true: weights are normalised between chunks alone, so choose "
            "ttt_kvb.output_rule = previous or simplified."
        )


TTT_KVB = TTTKVBSettings()
