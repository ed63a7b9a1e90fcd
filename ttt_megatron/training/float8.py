"""Float8 in a run: which products a recipe asks for, and their scales from step to step.

Delayed scales are the same on every rank: the largest values of a step are taken over all of
them, whatever parts of tensors, sequences and batches they saw. So they are saved once, and a
run goes on with them under any layout.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ttt_kernels import CurrentScaling, DelayedScaling
from ttt_kernels.fp8_linear.scaling import ROLES
from ttt_megatron.config.schema import Float8Config, RunConfig
from ttt_megatron.config.validate import transformer_engine_lacks
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.float8 import Float8Product, Products, float8_layers
from ttt_megatron.parallel.te_layers import (
    NoTransformerEngineError,
    TransformerEngineProduct,
    transformer_engine,
)

_LAYERS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_TENSOR_CORES = (8, 9)
_SCALES_BY_ROW = (9, 0)


def float8_products(config: RunConfig) -> Products | None:
    """What makes the run's float8 products; None for another precision.

    Raises UserError if the GPU cannot multiply in float8, or as `float8_backend` does.
    """
    if config.training.precision != "fp8":
        return None
    if float8_backend(config) == "transformer_engine":
        return partial(_transformer_engine_product, config.fp8)
    _require_tensor_cores(config)
    return partial(_product, config.fp8)


def float8_backend(config: RunConfig) -> str:
    """What multiplies in float8: "torch" or "transformer_engine".

    `auto` takes TransformerEngine where it can do what the recipe asks for. Raises UserError if it
    is asked for by name and cannot be had.
    """
    wanted = config.fp8.backend
    if wanted == "torch" or (wanted == "auto" and transformer_engine_lacks(config) is not None):
        return "torch"
    try:
        transformer_engine()
    except NoTransformerEngineError as error:
        if wanted == "auto":
            return "torch"
        raise UserError(
            f"fp8.backend=transformer_engine is not to be had: {error}. Set fp8.backend=torch, "
            "or auto for what there is"
        ) from None
    return "transformer_engine"


def _transformer_engine_product(
    settings: Float8Config, layer: nn.Module
) -> TransformerEngineProduct:
    delayed = settings.recipe == "delayed"
    return TransformerEngineProduct(
        layer, DelayedScaling(steps=settings.history) if delayed else None
    )


def _product(settings: Float8Config, layer: nn.Module) -> Float8Product:
    if settings.recipe == "delayed":
        return Float8Product(DelayedScaling(steps=settings.history))
    return Float8Product(CurrentScaling(rowwise=settings.scaling == "row"))


def _require_tensor_cores(config: RunConfig) -> None:
    if config.training.device == "cpu" or not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    needed = _SCALES_BY_ROW if config.fp8.scaling == "row" else _TENSOR_CORES
    if capability < needed:
        raise UserError(
            f"training.precision=fp8 with fp8.scaling={config.fp8.scaling} needs a GPU of compute "
            f"capability {needed[0]}.{needed[1]} or above, and this one has "
            f"{capability[0]}.{capability[1]}: set training.precision=bf16"
        )


class Float8Scales:
    """The float8 products of this rank's parts of the model, at the bounds of steps.

    `history` [layers, roles, steps] is that of the whole model; with current scaling there is
    none.
    """

    def __init__(self, learners: Sequence[Learner], config: RunConfig) -> None:
        own = [float8_layers(learner.model) for learner in learners]
        self._products: dict[str, Any] = {
            name: layer.float8 for layers in own for name, layer in layers.items()
        }
        blocks = range(config.model.num_layers)
        places = [f"layers.{block}.{layer}" for block in blocks for layer in _LAYERS]
        self._delayed: dict[int, DelayedScaling] = {
            places.index(name): product.scaling
            for name, product in self._products.items()
            if isinstance(product.scaling, DelayedScaling)
        }
        self._device = next(learners[0].parameters()).device
        self.history: Tensor | None = None
        if config.fp8.recipe == "delayed":
            self.history = torch.zeros(len(places), len(ROLES), config.fp8.history)

    def begin_step(self) -> None:
        """Before a step's passes: weights stay as they are, and what is seen counts."""
        for product in self._products.values():
            product.hold()
        for scaling in self._delayed.values():
            scaling.begin()

    def end_passes(self) -> None:
        """After a step's passes: delayed scales move on, the same on all ranks. Collective."""
        for product in self._products.values():
            product.release()
        if self.history is None:
            return
        # A stage may hold none of the layers, and takes part all the same.
        seen = torch.zeros(self.history.shape[:2], device=self._device)
        for place, scaling in self._delayed.items():
            seen[place].copy_(scaling.pending)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        rest = self.history[..., :-1].to(self._device)
        self._set(torch.cat((seen.unsqueeze(-1), rest), dim=-1))

    def _set(self, history: Tensor) -> None:
        self.history = history
        for place, scaling in self._delayed.items():
            scaling.load(history[place])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, equal on all ranks."""
        return {"history": None if self.history is None else self.history.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where the run that was saved stood."""
        if self.history is not None:
            self._set(state["history"])


def float8_scales(learners: Sequence[Learner], config: RunConfig) -> Float8Scales | None:
    """Those of a run in float8, else None."""
    return Float8Scales(learners, config) if config.training.precision == "fp8" else None
