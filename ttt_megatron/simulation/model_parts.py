"""The part of the model that every rank builds, on the meta device, and whether all parts make one.

Data- and context-parallel ranks hold copies: each pipeline × tensor coordinate is built once.
"""

from dataclasses import dataclass

import torch

from ttt_megatron.baselines.counts import count_with_mixers
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.model.stage import Stage
from ttt_megatron.parallel.shards import whole_shape
from ttt_megatron.simulation.world import World, as_rank, check_place
from ttt_megatron.training.run import build_learners


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """What the ranks of a coordinate hold: their stages, and parameters' shapes by name."""

    pipeline: int
    tensor: int
    stages: list[Stage]
    shapes: dict[str, torch.Size]
    element_size: int

    @property
    def parameters(self) -> int:
        """Their number."""
        return sum(shape.numel() for shape in self.shapes.values())


def build_parts(
    config: RunConfig, size: int, world: World, device: torch.device
) -> list[ModelPart]:
    """All coordinates' parts in a run of `size` processes, built by the code that ranks run.

    Raises UserError as that code does: also where the world has another size.
    """
    parts = []
    for pipeline in range(config.parallel.pipeline):
        for tensor in range(config.parallel.tensor):
            rank = world.at(pipeline=pipeline, tensor=tensor).rank
            with (
                as_rank(rank, size, config.parallel, device) as groups,
                torch.device("meta"),
            ):
                check_place(world, groups)
                learners = build_learners(config, groups)
            named = [pair for learner in learners for pair in learner.named_parameters()]
            parts.append(
                ModelPart(
                    pipeline=pipeline,
                    tensor=tensor,
                    stages=[learner.model.stage for learner in learners],
                    shapes={name: parameter.shape for name, parameter in named},
                    element_size=named[0][1].element_size(),
                )
            )
    return parts


def join_parts(config: RunConfig, parts: list[ModelPart]) -> dict[str, torch.Size]:
    """The whole parameters' shapes by name.

    A tied embedding is on the first and on the last stage. Raises RuntimeError unless the parts
    make the model once: a closed form says how large.
    """
    whole: dict[str, torch.Size] = {}
    for pipeline in range(config.parallel.pipeline):
        row = [part for part in parts if part.pipeline == pipeline]
        shapes = {
            name: whole_shape(name, shape, config.parallel.tensor)
            for name, shape in row[0].shapes.items()
        }
        for part in row[1:]:
            if part.shapes != row[0].shapes:
                raise RuntimeError(f"tensor rank {part.tensor} of stage {pipeline} holds others")
        twice = shapes.keys() & whole.keys()
        if twice - {"model.embedding.weight"}:
            raise RuntimeError(f"stage {pipeline} holds {min(twice)} of another stage")
        whole |= shapes
    wanted = count_with_mixers(config.model).total
    total = sum(shape.numel() for shape in whole.values())
    if total != wanted:
        raise RuntimeError(f"all parts make {total:,} parameters of {wanted:,}")
    return whole
