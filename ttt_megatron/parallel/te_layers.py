"""Float8 products by TransformerEngine's linear layer, where it is installed.

Its layer is once differentiable, which suffices: value and tangent of a pair are two inputs, of
two layers with scales of their own. TransformerEngine is imported when such a product is made and
not before, since an installation without its compiled core raises errors of many kinds.
"""

import importlib
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ttt_kernels
from ttt_kernels.fp8_linear.float8 import E4M3, fitting_exponent, largest, power_of_two
from ttt_kernels.fp8_linear.scaling import DelayedScaling, Role

_TOKENS = 16
"""Its kernels take multiples of this many rows."""


class NoTransformerEngineError(Exception):
    """Why TransformerEngine's float8 is not to be had, in one clause."""


def transformer_engine() -> Any:
    """The module transformer_engine.pytorch, of an installation that can multiply in float8 here.

    Raises NoTransformerEngineError.
    """
    if find_spec("transformer_engine") is None:
        raise NoTransformerEngineError("no package transformer_engine is installed")
    if not torch.cuda.is_available():
        raise NoTransformerEngineError("torch finds no CUDA device")
    try:
        module = importlib.import_module("transformer_engine.pytorch")
        available, reason = _availability(module)
    except Exception as error:
        # One without its compiled core raises RuntimeError, others OSError.
        raise NoTransformerEngineError(
            f"transformer_engine cannot be imported ({type(error).__name__}: {error})"
        ) from None
    if not available:
        raise NoTransformerEngineError(f"it says of this device: {reason}")
    return module


def _availability(module: Any) -> tuple[bool, str]:
    """Whether the device has float8, and why not."""
    if hasattr(module, "is_fp8_available"):
        found: tuple[bool, str] = module.is_fp8_available(return_reason=True)
    else:
        # Older releases tell it here alone; newer ones are to drop this module.
        fp8 = importlib.import_module("transformer_engine.pytorch.fp8")
        found = fp8.FP8GlobalStateManager.is_fp8_available()
    return found


def _autocast(module: Any, delayed: bool) -> AbstractContextManager[None]:
    """float8, e4m3 forwards and e5m2 backwards, with scales of the tensors at hand or given ones.

    Given ones are those of its delayed scaling, of which it may keep no history: it is set before
    every use.
    """
    recipes = importlib.import_module("transformer_engine.common.recipe")
    hybrid = recipes.Format.HYBRID
    recipe = (
        recipes.DelayedScaling(fp8_format=hybrid, amax_history_len=1, reduce_amax=False)
        if delayed
        else recipes.Float8CurrentScaling(fp8_format=hybrid)
    )
    context: AbstractContextManager[None]
    if hasattr(module, "autocast"):
        context = module.autocast(enabled=True, recipe=recipe)
    else:
        context = module.fp8_autocast(enabled=True, fp8_recipe=recipe)
    return context


_FORWARD, _BACKWARD = "scaling_fwd", "scaling_bwd"
_INPUT, _WEIGHT, _COTANGENT = 0, 1, 0
"""Where its layers keep the scales of what they multiply."""


def _set_scale(layer: Any, pass_: str, place: int, power: Tensor) -> None:
    """In place: the layer's quantizers hold views."""
    layer.fp8_meta[pass_].scale[place].copy_(power)


class _ScaledCotangent(torch.autograd.Function):
    """A layer's output as it is; gives the layer its cotangent's scale just before it needs it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, layer: Any, scaling: DelayedScaling, role: Role) -> Tensor:
        ctx.to = layer, scaling, role
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        layer, scaling, role = ctx.to
        amax = largest(cotangent.flatten(0, -2), False)
        _set_scale(layer, _BACKWARD, _COTANGENT, scaling.power(amax, role))
        return cotangent, None, None, None


class TransformerEngineProduct(nn.Module):
    """What a static linear layer multiplies by, in TransformerEngine's hands.

    The layer's own weights and their cut over processes stay as they are; TransformerEngine is
    given them call by call, and rounds them each time. What the forward sweep kept is not used: its
    layers compute both halves of a pair, and all gradients.

    Delayed scales are `scaling`'s, by role, and constant within a step. TransformerEngine moves
    its own whenever an autocast ends, so that a chunk computed again would not be what it was.
    """

    def __init__(self, layer: Any, scaling: DelayedScaling | None = None) -> None:
        """Without `scaling`, scales are of the tensors at hand. Raises NoTransformerEngineError."""
        super().__init__()
        self._module = transformer_engine()
        self.scaling = scaling
        # In a tuple they are no submodules: their weights are none of the model's.
        self._layers = tuple(
            self._module.Linear(
                layer.weight.shape[1], layer.weight.shape[0], bias=False, device="meta"
            )
            for _ in ("value", "tangent")
        )

    def begin_pass(self, weight: Tensor) -> None:
        """Nothing is kept of the weight."""

    def hold(self) -> None:
        """Nothing is kept of the weight."""

    def release(self) -> None:
        """Nothing is kept of the weight."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weightᵀ: [..., in], [out, in] → [..., out]."""
        forms_weight = weight.requires_grad and torch.is_grad_enabled()
        adjoint: Role = "cotangent" if forms_weight else "adjoint"
        return self._run(self._layers[0], x, weight, "input", adjoint)

    def pair(
        self,
        pair: Tensor,
        weight: Tensor,
        primal: Tensor | None = None,
        dot_adjoint: Tensor | None = None,
    ) -> Tensor:
        """The same of a value and its tangent: [2, ..., in], [out, in] → [2, ..., out]."""
        of_value, of_tangent = self._layers
        value = self._run(of_value, pair[0], weight, "input", "cotangent")
        tangent = self._run(of_tangent, pair[1], weight, "tangent", "tangent_cotangent")
        return torch.stack((value, tangent))

    def _run(self, layer: Any, x: Tensor, weight: Tensor, role: Role, adjoint: Role) -> Tensor:
        if ttt_kernels.uses_plain_definitions():
            raise ValueError("TransformerEngine's products have no plain definition")
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _TOKENS))
        own, scaling = layer._parameters["weight"], self.scaling
        # It takes weights of its input's dtype alone.
        layer._parameters["weight"] = weight.to(x.dtype)
        try:
            with _autocast(self._module, scaling is not None):
                if scaling is not None:
                    self._give_scales(layer, scaling, rows.detach(), weight.detach(), role)
                out: Tensor = layer(padded)
        finally:
            layer._parameters["weight"] = own
        if scaling is not None and out.requires_grad:
            out = _ScaledCotangent.apply(out, layer, scaling, adjoint)
        return out[: len(rows)].view(*x.shape[:-1], out.shape[-1])

    def _give_scales(
        self, layer: Any, scaling: DelayedScaling, rows: Tensor, weight: Tensor, role: Role
    ) -> None:
        # Makes the tensors of scales, the first time.
        layer.init_fp8_metadata(num_gemms=1)
        _set_scale(layer, _FORWARD, _INPUT, scaling.power(largest(rows, False), role))
        of_weight = power_of_two(fitting_exponent(largest(weight, False), E4M3))
        _set_scale(layer, _FORWARD, _WEIGHT, of_weight)
