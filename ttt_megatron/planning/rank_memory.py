"""Every rank's memory in a run's own layout and order of micro-batches."""

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning import transfers
from ttt_megatron.planning.layout import Layout
from ttt_megatron.planning.memory import stage_memory
from ttt_megatron.planning.mixers import require_known_mixers
from ttt_megatron.planning.stages import stage_blocks


def rank_memory(
    config: RunConfig, layout: Layout, *, on_cpu: bool = False
) -> list[dict[str, float]]:
    """Bytes by kind of every process, in the order of ranks: tensor, context, data, pipeline.

    In 1F1B order a process holds one micro-batch and one more for every process behind it that a
    forward pass goes through. `on_cpu` counts what gloo and the CPU's attention keep besides:
    messages until the end of the step, and scores over cached keys. Raises ValueError for mixers
    that plans do not know.
    """
    require_known_mixers(config.model)
    applied, number = layout.applied(config), layout.micro_batches(config)
    blocks = stage_blocks(applied, layout.pipeline, layout.pipeline)
    found = []
    for stage in range(layout.pipeline):
        replica = []
        for rank in range(layout.context):
            live = min(layout.context - rank + layout.pipeline - 1 - stage, number)
            held = stage_memory(
                applied, layout, stage, blocks[stage], index=rank, keep_scores=on_cpu
            )
            kinds = held.at(live)
            if on_cpu:
                sent = _sent(applied, layout, blocks[stage], stage, rank)
                # All forward messages, and those of the backward passes before the last `live`.
                kinds["messages under way"] = sent[0] * number + sent[1] * (number - live)
            replica += [kinds] * layout.tensor
        found += replica * layout.data
    return found


def _sent(
    config: RunConfig, layout: Layout, blocks: int, stage: int, rank: int
) -> tuple[float, float]:
    """Bytes of a micro-batch that a rank sends forwards and backwards to others."""
    last = layout.pipeline - 1
    part = config.data.sequence_length // layout.context
    layers = transfers.halo_layers(config, blocks, stage == last)
    forward, backward = (
        transfers.halo_of(config, layout, part * ranks) * layers
        for ranks in (layout.context - 1 - rank, rank)
    )
    if stage == last:
        if rank < layout.context - 1:
            forward += transfers.state_of(config, layout, part * (rank + 1))
        if rank > 0:
            backward += transfers.state_of(config, layout, part * rank)
    # Without context parallelism megatron-core's own schedules send, and keep nothing.
    boundary = transfers.boundary_bytes(config, layout) * (layout.context > 1)
    return forward + boundary * (stage < last), backward + boundary * (stage > 0)
