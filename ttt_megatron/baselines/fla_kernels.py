"""The recurrences by flash-linear-attention's kernels on CUDA, where these can be had.

They are tried against the definitions, values and gradients, on the device and with the shapes of
the model, before any is used. What they give is differentiable once.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import ttt_kernels
from ttt_megatron.baselines.gated_delta import GatedDeltaNet
from ttt_megatron.baselines.gated_delta_rule import DeltaRule, gated_delta_rule
from ttt_megatron.baselines.kernel_trial import (
    BOUNDS,
    KernelMissingError,
    try_delta_rule,
    try_state_space,
)
from ttt_megatron.baselines.mamba2 import Mamba2
from ttt_megatron.baselines.state_space import StateSpace, state_space


def use_fla_kernels(
    mixers: Iterable[nn.Module], device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Have mixers of equal shapes, computing in `dtype`, use the kernels where they can be had.

    Returns which recurrence each kind has, and why: {"Mamba2": "flash-linear-attention"} or
    {"Mamba2": "plain PyTorch (why)"}. Other modules are left alone.
    """
    chosen: dict[str, str] = {}
    found: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {}
    for mixer in mixers:
        if not isinstance(mixer, Mamba2 | GatedDeltaNet):
            continue
        kind = type(mixer)
        if kind.__name__ not in chosen:
            try:
                found[kind] = _tried(mixer, device, dtype)
                chosen[kind.__name__] = "flash-linear-attention"
            except KernelMissingError as error:
                chosen[kind.__name__] = f"plain PyTorch (flash-linear-attention {error})"
        if kind in found and isinstance(mixer, Mamba2):
            mixer.scan = found[kind]
        elif kind in found and isinstance(mixer, GatedDeltaNet):
            mixer.rule = found[kind]
    return chosen


def _tried(mixer: Mamba2 | GatedDeltaNet, device: torch.device, dtype: torch.dtype) -> Any:
    if device.type != "cuda":
        raise KernelMissingError(f"runs on CUDA alone, and this is {device.type}")
    if dtype not in BOUNDS:
        raise KernelMissingError(f"knows no {str(dtype).removeprefix('torch.')}")
    if isinstance(mixer, Mamba2):
        scan = fla_state_space(dtype)
        shape = (mixer.settings.state_size, mixer.settings.head_dim)
        try_state_space(scan, *shape, device, dtype)
        return scan
    rule = fla_delta_rule(dtype)
    try_delta_rule(rule, mixer.key_dim, mixer.value_dim, device, dtype)
    return rule


def fla_state_space(dtype: torch.dtype) -> StateSpace:
    """Mamba 2's as gated linear attention, products of `dtype`; raises KernelMissingError."""
    kernel = _imported("fla.ops.simple_gla").chunk_simple_gla

    def scan(
        c: Tensor, b: Tensor, x: Tensor, log_decay: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if ttt_kernels.uses_plain_definitions():
            return state_space(c, b, x, log_decay, state)
        by_head = (-1, -1, x.shape[2], -1)
        q, k = (t.to(dtype).unsqueeze(2).expand(by_head).contiguous() for t in (c, b))
        out, last = kernel(
            q=q,
            k=k,
            v=x.to(dtype),
            g=log_decay,
            scale=1.0,
            initial_state=state,
            output_final_state=True,
        )
        return out.to(x.dtype), last.to(x.dtype)

    return scan


def fla_delta_rule(dtype: torch.dtype) -> DeltaRule:
    """The gated delta rule, products of `dtype`; raises KernelMissingError."""
    kernel = _imported("fla.ops.gated_delta_rule").chunk_gated_delta_rule

    def rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if ttt_kernels.uses_plain_definitions():
            return gated_delta_rule(q, k, v, log_decay, beta, state)
        out, last = kernel(
            q=q.to(dtype),
            k=k.to(dtype),
            v=v.to(dtype),
            g=log_decay,
            beta=beta.to(dtype),
            scale=1.0,
            initial_state=state,
            output_final_state=True,
        )
        return out.to(v.dtype), last.to(v.dtype)

    return rule


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise KernelMissingError(f"is not installed: there is no module {error.name}") from None
    except Exception as error:
        # Versions that do not fit each other raise all kinds of errors.
        raise KernelMissingError(f"cannot be imported ({type(error).__name__}: {error})") from None
