"""Processes for tests of what ranks compute, forked from one that has imported everything once.

Importing torch and megatron-core takes a process longer than most tests take to compute. What the
launcher itself does is tested with the launcher (`tests/parallel/test_launcher.py` and others).
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_forkserver = multiprocessing.get_context("forkserver")
# The last two are what a run imports by itself, for its optimizer and its plot.
_forkserver.set_forkserver_preload(
    ["ttt_megatron.training.run", "ttt_megatron.cli.main", "torch._dynamo", "matplotlib.pyplot"]
)


def _rank(
    rank: int, size: int, port: int, work: Callable[..., Any], arguments: Any, told: Connection
) -> None:
    """One rank, as under torchrun; tells (whether it is well, its result or traceback)."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    try:
        result = work(*arguments)
        told.send((True, pickle.dumps(result if rank == 0 else None)))
    except BaseException:
        told.send((False, traceback.format_exc()))
        raise


def launch(work: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> Any:
    """Rank 0's result of `work(*arguments)` in so many ranks; an AssertionError if one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    waiting: dict[Connection, Any] = {}
    for rank in range(processes):
        told, telling = _forkserver.Pipe(duplex=False)
        process = _forkserver.Process(
            target=_rank, args=(rank, processes, port, work, arguments, telling)
        )
        process.start()
        telling.close()
        waiting[told] = (rank, process)
    started, result = dict(waiting), None
    try:
        while waiting:
            for told in wait(list(waiting)):
                rank, _ = waiting.pop(told)
                try:
                    well, content = told.recv()
                except EOFError:
                    well, content = False, "it ended without a word"
                if not well:
                    raise AssertionError(f"rank {rank}: {content}")
                if rank == 0:
                    result = pickle.loads(content)
        for _, process in started.values():
            process.join(60)
        return result
    finally:
        for _, process in started.values():
            if process.is_alive():
                process.kill()
            process.join()
