"""What a simulated rank builds is what a rank of four real processes builds."""

from dataclasses import replace

import pytest
import torch
from ranks import launch

from ttt_megatron.config import ModelConfig, ParallelConfig, RunConfig
from ttt_megatron.config.schema import DataConfig, InnerConfig, TrainingConfig
from ttt_megatron.data.stream import rank_rows
from ttt_megatron.parallel.groups import layout, processes
from ttt_megatron.simulation.data_split import split_data
from ttt_megatron.simulation.model_parts import build_parts, join_parts
from ttt_megatron.simulation.world import Place, build_world
from ttt_megatron.training.run import build_learners

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=48,
        num_layers=5,
        num_suffix_layers=2,
        hidden_size=16,
        num_heads=4,
        ffn_hidden_size=24,
        window_size=16,
    ),
    inner=InnerConfig(chunk_size=8),
    data=DataConfig(sequence_length=64),
    training=TrainingConfig(device="cpu", global_batch_size=8, micro_batch_size=2),
)
LAYOUTS = [
    ParallelConfig(tensor=2, context=2),
    ParallelConfig(pipeline=2, data=2),
    ParallelConfig(pipeline=2, virtual_pipeline=2, tensor=2, sequence_parallel=True),
    ParallelConfig(data=2, context=2, context_order="zigzag"),
]


def _own(config, groups):
    learners = build_learners(config, groups)
    shapes = {n: p.shape for one in learners for n, p in one.named_parameters()}
    place = Place(
        rank=groups.rank,
        tensor=groups.tensor_rank,
        context=groups.context_rank,
        data=groups.data_rank,
        pipeline=groups.pipeline_rank,
    )
    rows = rank_rows(0, config.training.global_batch_size, groups.data_rank, groups.data_size)
    return place, shapes, list(rows), groups.links.own_parts if groups.links else [0]


def _ranks(configs):
    """Of every layout and rank: where it stands, its parameters' shapes, the rows and parts."""
    found = []
    with processes("cpu") as device:
        for config in configs:
            with layout(device, config.parallel) as groups:
                found.append(groups.gather_objects(_own(config, groups)))
    return found


@pytest.mark.slow
def test_places_shapes_and_rows_are_those_of_four_processes():
    configs = [replace(CONFIG, parallel=parallel) for parallel in LAYOUTS]
    for config, ranks in zip(configs, launch(_ranks, (configs,), 4), strict=True):
        world = build_world(config.parallel)
        parts = build_parts(config, 4, world, torch.device("cpu"))
        join_parts(config, parts)
        split = split_data(config, world)
        for rank, (place, shapes, rows, own) in enumerate(ranks):
            assert place == world.places[rank]
            [simulated] = [
                p for p in parts if (p.pipeline, p.tensor) == (place.pipeline, place.tensor)
            ]
            assert simulated.shapes == shapes
            number = max(part for *_, parts_of in ranks for part in parts_of) + 1
            assert split.tokens == len(rows) * len(own) * 64 // number


def test_parts_that_do_not_make_the_model_are_told():
    config = replace(CONFIG, parallel=ParallelConfig(pipeline=2, data=2))
    parts = build_parts(config, 4, build_world(config.parallel), torch.device("cpu"))
    join_parts(config, parts)
    first, last = parts
    less = dict(list(last.shapes.items())[:-1])
    with pytest.raises(RuntimeError, match="parameters of"):
        join_parts(config, [first, replace(last, shapes=less)])
    with pytest.raises(RuntimeError, match="of another stage"):
        join_parts(config, [first, replace(last, shapes=last.shapes | first.shapes)])
