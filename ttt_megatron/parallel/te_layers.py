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


def _autocast(module: Any) -> AbstractContextManager[None]:
    """float8 with scales of the tensors at hand, e4m3 forwards and e5m2 backwards."""
    recipes = importlib.import_module("transformer_engine.common.recipe")
    recipe = recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID)
    context: AbstractContextManager[None]
    if hasattr(module, "autocast"):
        context = module.autocast(enabled=True, recipe=recipe)
    else:
        context = module.fp8_autocast(enabled=True, fp8_recipe=recipe)
    return context


class TransformerEngineProduct(nn.Module):
    """What a static linear layer multiplies by, in TransformerEngine's hands.

    The layer's own weights and their cut over processes stay as they are; TransformerEngine is
    given them call by call, and rounds them each time. What the forward sweep kept is not used: its
    layers compute both halves of a pair, and all gradients.
    """

    def __init__(self, layer: Any) -> None:
        """Raises NoTransformerEngineError."""
        super().__init__()
        self._module = transformer_engine()
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
        return self._run(self._layers[0], x, weight)

    def pair(
        self,
        pair: Tensor,
        weight: Tensor,
        primal: Tensor | None = None,
        dot_adjoint: Tensor | None = None,
    ) -> Tensor:
        """The same of a value and its tangent: [2, ..., in], [out, in] → [2, ..., out]."""
        halves = zip(self._layers, pair.unbind(0), strict=True)
        return torch.stack([self._run(layer, half, weight) for layer, half in halves])

    def _run(self, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        if ttt_kernels.uses_plain_definitions():
            raise ValueError("TransformerEngine's products have no plain definition")
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, -len(rows) % _TOKENS))
        own = layer._parameters["weight"]
        # It takes weights of its input's dtype alone.
        layer._parameters["weight"] = weight.to(x.dtype)
        try:
            with _autocast(self._module):
                out: Tensor = layer(padded)
        finally:
            layer._parameters["weight"] = own
        return out[: len(rows)].view(*x.shape[:-1], out.shape[-1])
