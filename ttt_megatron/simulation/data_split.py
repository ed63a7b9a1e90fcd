"""Which rows and tokens of a step each rank reads, and whether together they read all of them."""

from dataclasses import dataclass

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.stream import rank_rows
from ttt_megatron.parallel.context import part_length
from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.simulation.world import World


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """What a rank reads in a step: `rows` sequences in `micro_batches`, `length` tokens of each."""

    rows: int
    micro_batches: int
    length: int

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length


def split_data(config: RunConfig, world: World) -> DataSplit:
    """A rank's share of a step; all are equal.

    Raises UserError where batch or sequences cannot be cut so, and RuntimeError unless every token
    of the batch is read by the ranks of one data × context place, and by these alone.
    """
    parallel, training = config.parallel, config.training
    zigzag = parallel.context_order == "zigzag"
    read: dict[tuple[int, int], set[int]] = {}
    rows, length = range(0), 0
    for place in world.places:
        links = ContextLinks(rank=place.context, size=parallel.context, zigzag=zigzag, channels={})
        length = part_length(
            config.data.sequence_length, config.inner.chunk_size, links.num_parts
        ) * len(links.own_parts)
        rows = rank_rows(0, training.global_batch_size, place.data, parallel.data)
        for row in rows:
            for part in links.own_parts:
                read.setdefault((row, part), set()).add(
                    place.data * parallel.context + place.context
                )
    parts = 2 * parallel.context if zigzag else parallel.context
    wanted = {(row, part) for row in range(training.global_batch_size) for part in range(parts)}
    if read.keys() != wanted or any(len(copies) > 1 for copies in read.values()):
        raise RuntimeError("the ranks do not read every part of every row of a batch once")
    return DataSplit(
        rows=len(rows), micro_batches=-(-len(rows) // training.micro_batch_size), length=length
    )
