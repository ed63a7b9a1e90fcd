"""Cutting the model into pipeline stages: prefix blocks in front, the suffix whole at the end."""

from dataclasses import replace

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning.mixers import knows_mixers
from ttt_megatron.planning.step_work import step_work


def stage_blocks(config: RunConfig, stages: int, parts: int) -> list[int]:
    """Prefix blocks of each of `parts` parts that lie on `stages` stages in turn, by their FLOPs.

    The vocabulary's size must be known. Mixers that plans do not know weigh as windowed attention
    does: how evenly work is shared out is then a guess.
    """
    model = config.model
    if parts == 1:
        return [model.num_layers - model.num_suffix_layers]
    if not knows_mixers(model):
        config = replace(config, model=replace(model, mixers="attention"))
    work = step_work(config)
    block = work.block_forward + work.block_backward + work.block_weights
    rest = work.total.flops - block.flops * work.prefix_blocks
    return cut_prefix(work.prefix_blocks, parts, stages, block.flops, rest)


def cut_prefix(
    blocks: int, parts: int, stages: int, block_cost: float, end_cost: float
) -> list[int]:
    """Prefix blocks of each part, in order; part i lies on stage i mod `stages`.

    The last part also holds the suffix and the head, of cost `end_cost`. Every other part gets a
    block at least; the rest go one by one to the stage with the least to do.
    """
    counts = [1] * (parts - 1) + [0]
    load = [0.0] * stages
    for part, count in enumerate(counts):
        load[part % stages] += count * block_cost
    load[(parts - 1) % stages] += end_cost
    for _ in range(blocks - sum(counts)):
        stage = min(range(stages), key=lambda s: load[s])
        own = range(stage, parts, stages)
        part = min(own, key=lambda p: (counts[p], p))
        counts[part] += 1
        load[stage] += block_cost
    return counts
