"""A whole run over many GPUs in one process: everything that can fail there before the first step.

What ranks run is run here: their groups, parts of the model, shares of a batch and messages. What
this machine does not have, data, weights to start from, GPUs, is left out and named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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
from ttt_megatron.simulation.model_parts import ModelPart, build_parts, check_parts
from ttt_megatron.simulation.world import World, build_world
from ttt_megatron.training.checkpoint_folder import resolve_checkpoint
from ttt_megatron.training.preflight import check_data, with_vocabulary

_MOMENTS = 2


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
    laid_out = lay_out(recipe, overrides, gpus, hardware)
    config, unchecked = _with_what_is_here(laid_out.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = problem(config, recipe_layout(config), hardware.gpus_per_node)
    world = build_world(config.parallel)
    parts = build_parts(config, gpus, world, device)
    check_parts(config, parts)
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
        warnings=list(_warnings(config, hardware, obstacle)),
        unchecked=unchecked,
    )


def _with_what_is_here(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with its vocabulary; data and weights that are here are checked, others named."""
    unchecked, tokens = [], None
    if config.data.path and Path(config.data.path).exists():
        tokens = check_data(config)
    else:
        there = config.data.path or "data.path, which is empty"
        unchecked.append(f"data: there is no {there} here, so its length and vocabulary are open")
    start = config.training.init_from
    if start is not None:
        if Path(start).exists():
            resolve_checkpoint(Path(start))
        else:
            unchecked.append(f"weights: there is no {start} here, so their shapes are open")
    if not torch.cuda.is_available():
        unchecked.append("what needs CUDA: kernels, fused AdamW and norms, float8 products")
    return with_vocabulary(config, tokens), unchecked


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


def _warnings(config: RunConfig, hardware: Hardware, obstacle: str | None) -> Iterator[str]:
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
    if config.parallel.tensor > hardware.gpus_per_node:
        yield f"tensor groups of {config.parallel.tensor} reach over nodes"
