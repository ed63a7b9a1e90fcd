"""The order in which a rank takes its micro-batches under context parallelism.

The parts of a sequence form a pipeline: forward passes go from left to right, backward passes
from right to left. Every rank runs the same micro-batches in the same order, and waits for what
it receives; that alone makes the wavefront.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ttt_megatron.parallel.context_links import ContextLinks

Passed = TypeVar("Passed")


def one_forward_one_backward(
    num_micro_batches: int,
    links: ContextLinks,
    forward: Callable[[int], Passed],
    backward: Callable[[int, Passed], None],
) -> None:
    """Run `forward(i)` and `backward(i, its result)` for every micro-batch, each in order.

    Rank r runs size − 1 − r forward passes ahead, so that it holds at most size − r micro-batches
    at a time: one whole sequence's worth on rank 0. Any number of micro-batches will do. On
    return everything sent has arrived.
    """
    ahead = links.size - 1 - links.rank
    waiting: deque[tuple[int, Passed]] = deque()
    for index in range(num_micro_batches):
        waiting.append((index, forward(index)))
        if len(waiting) > ahead:
            backward(*waiting.popleft())
    while waiting:
        backward(*waiting.popleft())
    links.settle()
