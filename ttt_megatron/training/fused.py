"""Which AdamW makes the outer update: one that a user's build has fused, or torch's.

NVIDIA Apex and TransformerEngine update all parameters in a few kernels, and so does torch's own
AdamW with `fused`. All compute the same update, up to rounding. megatron-core takes the first that
it can import and does not say which; here the choice is made by name, checked and told.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from ttt_megatron.config.schema import FusedAdam, OptimizerConfig
from ttt_megatron.errors import UserError
from ttt_megatron.training.fused_packages import (
    NotAvailableError,
    imported,
    require_apex,
    require_transformer_engine,
)


@dataclass(frozen=True)
class Adam:
    """An AdamW by name, why it and no other, and its class, called as mcore calls Apex's."""

    name: str
    reason: str
    make: Callable[..., torch.optim.Optimizer]

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_adam(config: OptimizerConfig, device: torch.device, dtype: torch.dtype) -> Adam:
    """The AdamW for parameters of this dtype on this device.

    `auto` prefers, as mcore does, TransformerEngine's, then Apex's. Raises UserError if another is
    asked for by name that is not to be had or cannot do it.
    """
    wanted: FusedAdam = config.fused
    if wanted == "torch":
        return Adam("torch", "optimizer.fused = torch", TorchAdamW)
    problem = _cannot(device, dtype)
    if wanted == "auto":
        if problem is not None:
            return Adam("torch", f"those of TransformerEngine and Apex {problem}", TorchAdamW)
        for name, find in _FOUND_IN.items():
            try:
                return Adam(name, "the first that is installed", find())
            except NotAvailableError:
                continue
        return Adam("torch", "neither TransformerEngine nor NVIDIA Apex is installed", TorchAdamW)
    if problem is None:
        try:
            return Adam(wanted, f"optimizer.fused = {wanted}", _FOUND_IN[wanted]())
        except NotAvailableError as error:
            problem = f"is not to be had: {error}"
    raise UserError(
        f"optimizer.fused = {wanted}, and its AdamW {problem}; set optimizer.fused=torch, or auto "
        "for what there is"
    )


def _cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"run on CUDA alone, and this is {device.type}"
    if dtype == torch.float64:
        return "know no float64"
    return None


class TorchAdamW(torch.optim.AdamW):
    """torch's AdamW: fused on CUDA, over lists of tensors elsewhere."""

    def __init__(self, params: list[dict[str, Any]], *, adam_w_mode: bool, **settings: Any) -> None:
        """`adam_w_mode` must be true: decay is decoupled."""
        assert adam_w_mode
        fused = all(x.is_cuda for group in params for x in group["params"])
        super().__init__(params, fused=fused, foreach=not fused, **settings)


def find_apex() -> Callable[..., torch.optim.Optimizer]:
    """The class of NVIDIA's Apex, if its CUDA kernels are built; raises NotAvailableError."""
    require_apex("optimizers/fused_adam.py")
    optimizers = imported("apex.optimizers")
    applier = imported("apex.multi_tensor_apply").multi_tensor_applier
    if not applier.available:
        raise NotAvailableError("NVIDIA Apex was built without its CUDA kernels (--cuda_ext)")
    found: Callable[..., torch.optim.Optimizer] = optimizers.FusedAdam
    return found


def find_transformer_engine() -> Callable[..., torch.optim.Optimizer]:
    """TransformerEngine's class; raises NotAvailableError."""
    require_transformer_engine()
    found: Callable[..., torch.optim.Optimizer]
    found = imported("transformer_engine.pytorch.optimizers").FusedAdam
    return found


_FOUND_IN: dict[str, Callable[[], Callable[..., torch.optim.Optimizer]]] = {
    "transformer_engine": find_transformer_engine,
    "apex": find_apex,
}


@contextmanager
def mcore_adam(adam: Adam) -> Iterator[None]:
    """Within, `get_megatron_optimizer` makes this AdamW instead of the first it could import."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        patch.object(optimizer, "Adam", adam.make),
        patch.object(optimizer, "USING_PYTORCH_OPTIMIZER", False),
        patch.object(distrib_optimizer, "Adam", adam.make),
    ):
        yield
