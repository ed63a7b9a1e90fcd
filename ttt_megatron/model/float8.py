"""The static linear maps of a model in float8.

These are the products with qkv, proj, fc1 and fc2 of prefix and suffix. Everything else of the
model stays in the compute dtype: prime MLPs whose weights are fast or will be, norms, attention,
embedding and head.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

import ttt_kernels
from ttt_kernels import CurrentScaling, Float8Weight
from ttt_megatron.model.transformer import LanguageModel

Products = Callable[[nn.Module], nn.Module]
"""Makes the float8 product of a layer."""


class Float8Product(nn.Module):
    """What one static linear layer multiplies by, and the scales of all that passes through it.

    The weight is rounded at the start of a pass, and used for every chunk of it. A caller that
    knows until when weights stay as they are may `hold` them: the next pass rounds them, and
    until `release` no further one.
    """

    def __init__(self, scaling: CurrentScaling) -> None:
        super().__init__()
        self.scaling = scaling
        self._rounded: Float8Weight | None = None
        self._of: tuple[int, int] | None = None
        self._holds = self._is_current = False

    def begin_pass(self, weight: Tensor) -> None:
        """Round the weight: it may have changed since the pass before."""
        if not self._is_current:
            self._round(weight)
            self._is_current = self._holds

    def hold(self) -> None:
        """The weight will not change."""
        self._holds, self._is_current = True, False

    def release(self) -> None:
        """The weight may change again."""
        self._holds = self._is_current = False

    def _round(self, weight: Tensor) -> None:
        fresh, old = ttt_kernels.fp8_weight(weight, self.scaling), self._rounded
        self._of = _identity(weight)
        if old is None or old.forward.data.device != weight.device:
            self._rounded = fresh
            return
        # In place: recorded CUDA graphs read this memory. Where a graph of autograd still does,
        # the weight is the one it was, so what it reads does not change.
        for kept, new in ((old.forward, fresh.forward), (old.backward, fresh.backward)):
            kept.data.data.copy_(new.data)
            kept.inverse.data.copy_(new.inverse)

    def rounded(self, weight: Tensor) -> Float8Weight:
        """The weight in float8. Stand-ins for it share its memory, and so its rounded copy."""
        if self._rounded is None or self._of != _identity(weight):
            return ttt_kernels.fp8_weight(weight, self.scaling)
        return self._rounded

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weightᵀ: [..., in], [out, in] → [..., out]."""
        if ttt_kernels.uses_plain_definitions():
            return ttt_kernels.fp8_linear(x, weight, self.scaling)
        return ttt_kernels.fp8_linear(x, weight, self.scaling, self.rounded(weight))

    def pair(
        self,
        pair: Tensor,
        weight: Tensor,
        primal: Tensor | None = None,
        dot_adjoint: Tensor | None = None,
    ) -> Tensor:
        """The same and its derivative, as `ttt_kernels.fp8_linear_pair`."""
        return ttt_kernels.fp8_linear_pair(
            pair, weight, self.scaling, self.rounded(weight), primal, dot_adjoint
        )


def _identity(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def static_linears(model: LanguageModel) -> Iterator[Any]:
    """The layers whose products may be in float8: two an attention, two a static MLP."""
    for block in model.blocks():
        attention: Any = block.self_attention
        if attention is not None:
            yield attention.linear_qkv
            yield attention.linear_proj
        yield block.mlp.linear_fc1
        yield block.mlp.linear_fc2


def use_float8(model: LanguageModel, make: Products) -> None:
    """Give every static linear map of a model a float8 product of its own."""
    for layer in static_linears(model):
        layer.float8 = make(layer)


def float8_layers(model: LanguageModel) -> dict[str, Any]:
    """The layers with a product in float8, by name; none in a model without float8."""
    names = {module: name for name, module in model.named_modules()}
    return {names[one]: one for one in static_linears(model) if one.float8 is not None}
