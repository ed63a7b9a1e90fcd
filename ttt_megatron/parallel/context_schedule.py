"""The order in which a rank takes its micro-batches under context parallelism.

The parts of a sequence form a pipeline: forward passes go from left to right, backward passes
from right to left. Every rank runs the same micro-batches in the same order, and waits for what
it receives; that alone makes the wavefront.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

Passed = TypeVar("Passed")


def one_forward_one_backward(
    num_micro_batches: int,
    ahead: int,
    forward: Callable[[int], Passed],
    backward: Callable[[int, Passed], None],
) -> None:
    """Run `forward(i)` and `backward(i, its result)` for every micro-batch, each in order.

    The rank runs `ahead` forward passes ahead: as many as there are ranks behind it in the chain,
    of parts and of pipeline stages, that a forward pass goes through. It holds at most ahead + 1
    micro-batches at a time: of parts, one whole sequence's worth on rank 0. Any number of
    micro-batches will do.
    """
    waiting: deque[tuple[int, Passed]] = deque()
    for index in range(num_micro_batches):
        waiting.append((index, forward(index)))
        if len(waiting) > ahead:
            backward(*waiting.popleft())
    while waiting:
        backward(*waiting.popleft())
