"""Parts of one computation that reduce over each other, as processes do, in one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

Reduce = Callable[[Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor]


def in_lock_step(parts: int, run: Callable[[int, Reduce], object]) -> list:
    """[run(0, reduce), run(1, reduce), …] on threads of which one at a time runs.

    reduce(x, combine) waits for all parts and combines their tensors. (Triton's interpreter cannot
    run two kernels at once.)
    """
    meeting, turn = threading.Barrier(parts), threading.Lock()
    given: list[Tensor | None] = [None] * parts

    def reduce_for(rank):
        def reduce(x, combine):
            given[rank] = x.clone()
            turn.release()
            meeting.wait()
            turn.acquire()
            result = given[0]
            for other in given[1:]:
                result = combine(result, other)
            turn.release()
            meeting.wait()
            turn.acquire()
            return result

        return reduce

    def run_one(rank):
        with turn:
            try:
                return run(rank, reduce_for(rank))
            except BaseException:
                meeting.abort()
                raise

    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(run_one, range(parts)))
