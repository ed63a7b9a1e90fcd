"""The layers a model is built from: plain ones here; parallel ones are filled in from outside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ttt_kernels
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model import ops
from ttt_megatron.model.head import WHOLE_HEAD, Head
from ttt_megatron.model.ops import Operand


def static_product(x: Operand, weight: Tensor, float8: nn.Module | None) -> Operand:
    """x @ weightᵀ, in float8 where the layer has a product that does it."""
    if float8 is None:
        return ops.linear(x, weight)
    return ops.float8_linear(x, weight, float8)


class Linear(nn.Module):
    """A static linear map without bias; weight [out, in].

    What lies around the product is apart, for products with other weights: fast ones.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.float8: nn.Module | None = None

    def forward(self, x: Operand) -> Operand:
        """[..., in] → [..., out], in x's dtype."""
        return self.leave(static_product(self.enter(x), self.weight, self.float8))

    def enter(self, x: Operand) -> Operand:
        """The input as the product needs it."""
        return x

    def leave(self, out: Operand) -> Operand:
        """The layer's output from the product."""
        return out


NormFunction = Callable[[Tensor, Tensor, float], Tensor]
"""(x [..., width], gain [width], eps) → RMS-normalised [..., width], once differentiable."""


class RMSNorm(nn.Module):
    """RMSNorm with a gain; weight [width].

    `fused`, where it is set, normalises instead of ttt_kernels; it takes ordinary tensors alone.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.fused: NormFunction | None = None

    def forward(self, x: Operand) -> Operand:
        """[..., width] → [..., width]."""
        if self.fused is not None and not ttt_kernels.uses_plain_definitions():
            return self.fused(x, self.weight, self.eps)
        return ops.rms_norm(x, self.weight, eps=self.eps)


class NoNorm(nn.Module):
    """What stands in a norm's place in models that lack it: no parameters, x as it is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()

    def forward(self, x: Operand) -> Operand:
        """[..., width] → [..., width]."""
        return x


class Embedding(nn.Module):
    """Token embedding; weight [vocabulary, width]."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T] int64 → [b, T, width]."""
        return nn.functional.embedding(tokens, self.weight)


def _same(x: Tensor) -> Tensor:
    return x


def _same_shape(name: str, shape: torch.Size) -> torch.Size:
    return shape


def _whole(name: str, x: Tensor) -> Tensor:
    return x


def _not_mine(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    return None


@dataclass(frozen=True)
class Slots:
    """Constructors of the layers. A parallel build replaces some of them.

    `column` makes linears whose output is cut over heads or MLP columns (qkv, fc1), `row` those
    whose input is (proj, fc2); `parts` is the number of parts. sum_parts adds a tensor over them;
    all_tokens and own_tokens go between the tokens [b, T, H] of all parts and a part's own, where
    parts share them. whole_shape is the shape of the whole parameter of a name, given a part's;
    take_part is this process's part of it. `mixers` makes what stands in attention's place, by
    kind: modules called as `SelfAttention` is, whose state is a tuple of tensors [b, …];
    `initial_value` draws their own parameters, and none of others.
    """

    column: Callable[[int, int], nn.Module] = Linear
    row: Callable[[int, int], nn.Module] = Linear
    norm: Callable[[int, float], nn.Module] = RMSNorm
    embedding: Callable[[int, int], nn.Module] = Embedding
    head: Head = WHOLE_HEAD
    parts: int = 1
    sum_parts: Callable[[Tensor], Tensor] = _same
    all_tokens: Callable[[Tensor], Tensor] = _same
    own_tokens: Callable[[Tensor], Tensor] = _same
    whole_shape: Callable[[str, torch.Size], torch.Size] = _same_shape
    mixers: Mapping[str, Callable[[ModelConfig, "Slots"], nn.Module]] = field(default_factory=dict)
    initial_value: Callable[[str, torch.Size, torch.Generator], Tensor | None] = _not_mine
    take_part: Callable[[str, Tensor], Tensor] = _whole


def optional_norm(wanted: bool, slots: Slots) -> Callable[[int, float], nn.Module]:
    """The slots' norm, or none at all."""
    return slots.norm if wanted else NoNorm
