"""Writing this rank's files of a checkpoint in a thread, from memory that training leaves alone.

megatron-core plans a save and leaves the writing to processes that it forks. A fork of a process
that computes in other threads can hang, and it can outlive a killed run; a thread can do neither.
"""

import inspect
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from ttt_megatron.training.manifest import Entries, describe_files

# It turns the garbage collector off, which is meant for a process of its own.
_write_bucket = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)


def expect_results() -> None:
    """Readies megatron-core for the save that is planned next.

    It would start a process to hold the results of the writing, one that outlives a killed run.
    """
    filesystem_async._results_queue = queue.SimpleQueue()


class BackgroundWrite:
    """The thread that writes what a planned save has for this rank.

    `entries` are the written files' for the manifest, once the thread has ended; `error` is what
    it ended with otherwise.
    """

    def __init__(self, request: AsyncRequest, folder: Path, live: Iterable[torch.Tensor]) -> None:
        """Copies what training will change, which takes the time it takes, then starts.

        `live` tensors are those that go on changing; everything else in the save is its own.
        The manifest's names are relative to `folder`.
        """
        self.entries: Entries = {}
        self.error: Exception | None = None
        self._folder = folder
        self._stop = threading.Event()
        self._transforms: Any = None
        self._buckets: list[Any] = []
        self._results: Any = None
        if request.async_fn is not None:
            self._transforms = request.async_fn.args[0]
            _, buckets, self._results = request.async_fn_args
            storages = {_address(tensor) for tensor in live}
            for path, key, (data, tensors) in buckets:
                own = [(item, _own(tensor, storages)) for item, tensor in tensors]
                tensors.clear()  # the request, and what it holds, lives until the save is complete
                self._buckets.append((path, key, (data, own)))
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether everything is on disk, or never will be."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Returns when `done`."""
        self._thread.join()

    def abandon(self) -> None:
        """Ends the thread before its next tensor, and waits for that."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            written = {}
            for index, bucket in enumerate(self._buckets):
                written[index] = self._write(index, bucket)
            if self._results is not None:
                self._results.put(written)
            if self._stop.is_set():
                return
            files = [Path(path) for path, _, _ in self._buckets]
            self.entries = describe_files(self._folder, files)
        except Exception as error:
            self.error = error

    def _write(self, index: int, bucket: Any) -> list[Any]:
        """One file, on disk when it returns; gives megatron-core's account of it."""
        path, key, (data, tensors) = bucket
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        counts: queue.Queue[int] = queue.Queue()
        counts.put(index)
        _write_bucket(
            self._transforms,
            index,
            (path, key, (data, self._until_stopped(tensors))),
            results,
            counts,
            use_fsync=True,
        )
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        written: list[Any] = outcome
        return written

    def _until_stopped(self, tensors: list[Any]) -> Iterator[Any]:
        """Tensors one by one; each is let go of once it is written."""
        tensors.reverse()
        while tensors:
            if self._stop.is_set():
                raise InterruptedError("the run ended first")
            yield tensors.pop()


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _own(tensor: torch.Tensor, live: set[tuple[torch.device, int]]) -> torch.Tensor:
    """The tensor on the CPU, in memory that nothing else writes to."""
    copied = tensor.device.type == "cpu" and _address(tensor) in live
    return tensor.clone() if copied else tensor.cpu()
