"""Where a rank's part of a parameter lies in the whole one that a checkpoint stores.

Checkpoints store parameters, and moments like them, whole and in the shapes one process would give
them; every rank writes and reads its own part, under whatever layout.
"""

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.shards import cut_of


def sharded(
    key: str, name: str, part: torch.Tensor, groups: Groups, replica: int
) -> list[ShardedTensor]:
    """mcore's description of this rank's part, sharing its memory, of what is stored as `key`.

    `name` is the parameter's; `replica` tells apart the data × context ranks that hold the same,
    of which 0 writes.
    """
    cut = cut_of(name) if groups.tensor_size > 1 else None
    if cut is None:
        replicas = (0, groups.tensor_rank, replica)
        return [ShardedTensor.from_rank_offsets(key, part, replica_id=replicas)]
    count = groups.tensor_size * cut.pieces
    return [
        ShardedTensor.from_rank_offsets(
            key, block, (cut.axis, index, count), replica_id=(0, 0, replica)
        )
        for index, block in cut.blocks(part, groups.tensor_rank, groups.tensor_size)
    ]


def joined(name: str, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """A rank's part from its loaded blocks, in `sharded`'s order."""
    if len(blocks) == 1:
        return blocks[0]
    cut = cut_of(name)
    assert cut is not None
    return torch.cat(list(blocks), dim=cut.axis)
