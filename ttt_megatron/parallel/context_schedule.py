"""The order in which a rank takes its micro-batches under context parallelism.

The parts of a sequence form a pipeline: forward passes go from left to right, backward passes
from right to left. Every rank runs the same micro-batches in the same order, and waits for what
it receives; that alone makes the wavefront.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

Passed = TypeVar("Passed")


def _nothing(index: int) -> None:
    """Nothing can be expected."""


def one_forward_one_backward(
    num_micro_batches: int,
    ahead: int,
    forward: Callable[[int], Passed],
    backward: Callable[[int, Passed], None],
    expect_forward: Callable[[int], None] = _nothing,
    expect_backward: Callable[[int], None] = _nothing,
) -> None:
    """Run `forward(i)` and `backward(i, its result)` for every micro-batch, each in order.

    The rank runs `ahead` forward passes ahead: as many as there are ranks behind it in the chain,
    of parts and of pipeline stages, that a forward pass goes through. It holds at most ahead + 1
    micro-batches at a time: of parts, one whole sequence's worth on rank 0. Any number of
    micro-batches will do.

    `expect_forward(i)` and `expect_backward(i)` are called before the pass that precedes it, so
    that what the pass receives may come in meanwhile.
    """
    order = _order(num_micro_batches, ahead)
    waiting: deque[Passed] = deque()
    for place, (is_forward, index) in enumerate(order):
        if place == 0:
            expect_forward(index)
        if place + 1 < len(order):
            next_is_forward, next_index = order[place + 1]
            expect = expect_forward if next_is_forward else expect_backward
            expect(next_index)
        if is_forward:
            waiting.append(forward(index))
        else:
            backward(index, waiting.popleft())


def _order(num_micro_batches: int, ahead: int) -> list[tuple[bool, int]]:
    """The passes in turn: (whether forward, micro-batch)."""
    order = []
    for index in range(num_micro_batches + ahead):
        if index < num_micro_batches:
            order.append((True, index))
        if 0 <= index - ahead < num_micro_batches:
            order.append((False, index - ahead))
    return order
