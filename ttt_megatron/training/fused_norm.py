"""Whose RMSNorm the prefix normalises with: one that a user's build has fused, or ttt_kernels'.

The suffix's norms also take tangents, and what they keep is read by the reverse sweep: these are
ttt_kernels' always. NVIDIA Apex and TransformerEngine round the gain to the activations' dtype, as
every other weight is; ttt_kernels reads it in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import plain_definitions, rms_norm
from ttt_megatron.config.schema import FusedNorm
from ttt_megatron.errors import UserError
from ttt_megatron.model.slots import NormFunction, RMSNorm
from ttt_megatron.model.transformer import LanguageModel
from ttt_megatron.training.fused_packages import (
    NotAvailableError,
    imported,
    require_apex,
    require_transformer_engine,
)

_EPS = 0.1
"""Of the trial: large, so that one that is misplaced shows."""

_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest differences of the trial, relative to the largest entry."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm by name, and why it and no other; `make` is None for ttt_kernels'."""

    name: str
    reason: str
    make: Callable[[], NormFunction] | None

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"

    def install(self, model: LanguageModel) -> None:
        """Have the norms of the model's prefix blocks use it."""
        if self.make is None:
            return
        for block in model.blocks(0, model.num_prefix_layers):
            for module in block.modules():
                if isinstance(module, RMSNorm):
                    module.fused = self.make()


def choose_norm(wanted: FusedNorm, device: torch.device, dtype: torch.dtype) -> Norm:
    """The norm for activations of this dtype on this device.

    `auto` prefers TransformerEngine's, then Apex's. Either is tried against the definition first.
    Raises UserError if one is asked for by name that is not to be had.
    """
    if wanted == "ttt_kernels":
        return Norm("ttt_kernels", "training.fused_norm = ttt_kernels", None)
    problem = _cannot(device, dtype)
    reasons = {}
    for name, find in _FOUND_IN.items():
        if problem is not None or wanted not in ("auto", name):
            continue
        try:
            make = find()
            try_out(make(), device, dtype)
        except NotAvailableError as error:
            reasons[name] = f"is not to be had: {error}"
        else:
            chosen = "the first to be had" if wanted == "auto" else f"training.fused_norm = {name}"
            return Norm(name, chosen, make)
    if wanted != "auto":
        raise UserError(
            f"training.fused_norm = {wanted}, and its RMSNorm {problem or reasons[wanted]}; set "
            "training.fused_norm=ttt_kernels, or auto for what there is"
        )
    others = "those of TransformerEngine and Apex"
    if problem is None:
        problem = "; ".join(f"{name}'s {reason}" for name, reason in reasons.items())
        return Norm("ttt_kernels", problem, None)
    return Norm("ttt_kernels", f"{others} {problem}", None)


def _cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"run on CUDA alone, and this is {device.type}"
    return "know no float64" if dtype == torch.float64 else None


def find_apex_norm() -> Callable[[], NormFunction]:
    """Apex's function, if that is what is installed; raises NotAvailableError."""
    require_apex("normalization/fused_layer_norm.py")
    imported("fused_layer_norm_cuda")
    normalised = imported("apex.normalization.fused_layer_norm").fused_rms_norm_affine

    def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        out: Tensor = normalised(x, gain.to(x.dtype), tuple(gain.shape), eps)
        return out

    return lambda: norm


def find_transformer_engine_norm() -> Callable[[], NormFunction]:
    """TransformerEngine's layer, given the gain call by call; raises NotAvailableError."""
    require_transformer_engine()
    kind = imported("transformer_engine.pytorch").RMSNorm
    return lambda: _TransformerEngineNorm(kind)


class _TransformerEngineNorm:
    """Its layer reads its gain once more in the backward pass: it keeps the one it was given.

    Gains do not change between a forward pass and its backward pass, however many are under way.
    """

    def __init__(self, kind: Callable[..., Any]) -> None:
        self._kind = kind
        self._layer: Any = None

    def __call__(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        if self._layer is None:
            self._layer = self._kind(len(gain), eps=eps, device="meta")
        self._layer._parameters["weight"] = gain.to(x.dtype)
        out: Tensor = self._layer(x)
        return out


def try_out(norm: NormFunction, device: torch.device, dtype: torch.dtype) -> None:
    """Raises NotAvailableError if value or gradients differ from the definition's in float64."""
    generator = torch.Generator().manual_seed(0)
    x, cotangent = (torch.randn(3, 5, 64, generator=generator).to(dtype) for _ in range(2))
    gain = torch.rand(64, generator=generator).add(0.5).to(dtype)
    try:
        on_device = (t.to(device) for t in (x, gain.float(), cotangent))
        found = _value_and_gradients(norm, *on_device)
    except Exception as error:
        raise NotAvailableError(
            f"a trial of it failed ({type(error).__name__}: {error})"
        ) from error
    with plain_definitions():
        exact = _value_and_gradients(rms_norm, *(t.double() for t in (x, gain, cotangent)))
    for what, a, e in zip(("value", "gradient", "gain's gradient"), found, exact, strict=True):
        if a.shape != e.shape:
            raise NotAvailableError(f"its {what} has the shape {list(a.shape)}")
        off = float((a.cpu().double() - e).abs().max() / e.abs().max())
        if not off <= _BOUNDS[dtype]:
            raise NotAvailableError(f"its {what} is {off:.1e} off the definition's")


def _value_and_gradients(
    norm: NormFunction, x: Tensor, gain: Tensor, cotangent: Tensor
) -> list[Tensor]:
    x.requires_grad_()
    gain.requires_grad_()
    out = norm(x, gain, _EPS)
    return [out.detach(), *torch.autograd.grad(out, [x, gain], cotangent)]


_FOUND_IN = {
    "transformer_engine": find_transformer_engine_norm,
    "apex": find_apex_norm,
}
