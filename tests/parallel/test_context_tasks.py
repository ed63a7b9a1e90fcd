"""The order of passes with two parts a rank: complete, in turn, and free of circular waits."""

from collections import Counter
from graphlib import TopologicalSorter
from itertools import pairwise

import pytest

from ttt_megatron.parallel.context_tasks import PartPass, zigzag_order

KINDS = ("prefix_forward", "suffix_forward", "suffix_backward", "prefix_backward")


def waits_for(one: PartPass, num_parts: int) -> list[PartPass]:
    """Passes, on whatever rank, that must at least have begun."""

    def of(kind: str, part: int) -> list[PartPass]:
        return [PartPass(kind, one.micro_batch, part)] if 0 <= part < num_parts else []

    part = one.part
    return {
        "prefix_forward": of("prefix_forward", part - 1),
        "suffix_forward": of("prefix_forward", part) + of("suffix_forward", part - 1),
        "suffix_backward": of("suffix_forward", part) + of("suffix_backward", part + 1),
        "prefix_backward": of("suffix_backward", part) + of("prefix_backward", part + 1),
    }[one.kind]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 9, 20])
def test_order(size, micro_batches):
    orders = [zigzag_order(micro_batches, size, rank) for rank in range(size)]
    graph: dict[PartPass, list[PartPass]] = {}
    for rank, order in enumerate(orders):
        parts = (rank, 2 * size - 1 - rank)
        assert Counter(order) == Counter(
            PartPass(kind, index, part)
            for kind in KINDS
            for index in range(micro_batches)
            for part in parts
        )
        for kind in KINDS:
            for part in parts:
                turns = [p.micro_batch for p in order if (p.kind, p.part) == (kind, part)]
                assert turns == list(range(micro_batches))
        live = 0
        for one in order:
            live += (one.kind == "prefix_forward") - (one.kind == "prefix_backward")
            assert live <= 4 * size
        graph |= {one: waits_for(one, 2 * size) for one in order}
        for before, one in pairwise(order):
            graph[one].append(before)
    assert len(list(TopologicalSorter(graph).static_order())) == 8 * size * micro_batches
