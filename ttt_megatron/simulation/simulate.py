"""A whole run over many GPUs in one process: everything that can fail there before the first step.

What ranks run is run here: their groups, parts of the model, shares of a batch and messages. What
this machine does not have, data, weights to start from, GPUs, is left out and named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ttt_megatron.config import load_recipe
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.planning.estimate import Estimate, Estimator
from ttt_megatron.planning.hardware import GIB, Hardware
from ttt_megatron.planning.laid_out import LaidOut, lay_out
from ttt_megatron.planning.layout import problem, recipe_layout
from ttt_megatron.planning.mixers import knows_mixers
from ttt_megatron.planning.units import in_float8
from ttt_megatron.simulation.data_split import DataSplit, split_data
from ttt_megatron.simulation.messages import check_messages
from ttt_megatron.simulation.model_parts import ModelPart, build_parts, join_parts
from ttt_megatron.simulation.what_is_here import WhatIsHere
from ttt_megatron.simulation.world import World, build_world
from ttt_megatron.training.preflight import with_vocabulary

_MOMENTS = 2
_MUCH_WAITING = 0.25


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was found: all ranks' places, parts and shares; `unchecked` and `warnings` in sentences.

    `estimate` is the plan's of the layout, None where the plan does not know the model's mixers or
    the run is not for GPUs.
    """

    laid_out: LaidOut
    config: RunConfig
    hardware: Hardware
    world: World
    parts: list[ModelPart]
    data: DataSplit
    messages: int
    estimate: Estimate | None
    warnings: list[str]
    unchecked: list[str]

    def state_bytes(self, part: ModelPart) -> tuple[int, int]:
        """Bytes of a rank's parameters and gradients, and of its share of the optimizer's state."""
        return _state_bytes(self.config, part)


def simulate_run(
    recipe: str | Path, overrides: Sequence[str], gpus: int, hardware: Hardware
) -> Simulation:
    """The run of a recipe on so many GPUs, laid out as `lay_out` does.

    Raises UserError, in the words of the cluster, for whatever would fail there and can be known
    here; RuntimeError where what the ranks would do does not fit together.
    """
    if gpus < 1:
        raise UserError(f"--simulate-world {gpus}: give a number of at least 1")
    here = WhatIsHere.of(load_recipe(recipe, overrides))
    laid_out = lay_out(recipe, [*overrides, *here.vocabulary], gpus, hardware)
    config = with_vocabulary(laid_out.config, here.tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = problem(config, recipe_layout(config), hardware.gpus_per_node)
    world = build_world(config.parallel)
    parts = build_parts(config, gpus, world, device)
    here.check_starts(config, join_parts(config, parts))
    data = split_data(config, world)
    messages = check_messages(config, world, device)
    estimate = _estimate(config, hardware) if obstacle is None else None
    _require_memory(config, hardware, parts, estimate, gpus)
    return Simulation(
        laid_out=laid_out,
        config=config,
        hardware=hardware,
        world=world,
        parts=parts,
        data=data,
        messages=messages,
        estimate=estimate,
        warnings=list(_warnings(config, estimate, obstacle)),
        unchecked=here.unchecked,
    )


def _estimate(config: RunConfig, hardware: Hardware) -> Estimate | None:
    if not knows_mixers(config.model) or config.training.device == "cpu":
        return None
    if in_float8(config) and not hardware.fp8_tflops:
        raise UserError(
            f"training.precision=fp8: {hardware.name} has no products in float8; set "
            "training.precision=bf16 or take another --gpu"
        )
    layout = recipe_layout(config)
    estimator = Estimator(config, layout, hardware)
    if layout.schedule not in estimator.names():
        return None
    return estimator.estimate(schedule=layout.schedule)


def _require_memory(
    config: RunConfig,
    hardware: Hardware,
    parts: list[ModelPart],
    estimate: Estimate | None,
    gpus: int,
) -> None:
    """Raises UserError where a rank holds more than a GPU has."""
    if config.training.device == "cpu":
        return
    usable = f"{hardware.memory_bytes / GIB:.1f} usable ones of {hardware.name}"
    advice = "take more GPUs, larger ones, another layout, or shorter sequences"
    if estimate is not None and not estimate.fits:
        needed = estimate.chosen.memory_bytes / GIB
        raise UserError(
            f"{config.name} on {gpus} GPUs as {estimate.layout} with {estimate.layout.choices} "
            f"needs {needed:.1f} GiB a GPU of {usable}; {advice}"
        )
    for part in parts:
        held = sum(_state_bytes(config, part))
        if held > hardware.memory_bytes:
            raise UserError(
                f"{config.name} on {gpus} GPUs: parameters, gradients and optimizer state alone "
                f"are {held / GIB:.1f} GiB on pipeline rank {part.pipeline} of {usable}; {advice}"
            )


def _state_bytes(config: RunConfig, part: ModelPart) -> tuple[int, int]:
    copies = config.parallel.data * config.parallel.context
    held = part.parameters * part.element_size
    gradients = -(-held // copies) if config.optimizer.zero_stage == 2 else held
    return held + gradients, -(-_MOMENTS * held // copies)


def _warnings(config: RunConfig, estimate: Estimate | None, obstacle: str | None) -> Iterator[str]:
    """What trains and is perhaps not meant."""
    if obstacle is not None:
        yield f"{obstacle}: memory and time are not estimated"
    elif config.training.device == "cpu":
        yield "training.device = cpu: memory and time of GPUs are not estimated"
    elif not knows_mixers(config.model):
        yield (
            f"model.mixers = {config.model.mixers} is not planned: memory beside parameters, "
            "gradients and optimizer state, and time, are not estimated"
        )
    if estimate is not None and estimate.chosen.bubble > _MUCH_WAITING:
        yield (
            f"GPUs wait for each other {estimate.chosen.bubble:.0%} of a step: more micro-batches, "
            "fewer stages or context-parallel ranks would leave them less to wait for"
        )
