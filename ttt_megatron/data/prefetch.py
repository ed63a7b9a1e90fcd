"""Reading batches ahead in a thread."""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType

from ttt_megatron.data.stream import Batch, TokenStream


class Prefetcher:
    """Iterates over a rank's batches of `stream` from its position on, without end.

    The stream's position counts the batches handed out, not those read ahead. While it is open,
    the stream is not to be moved by others. A reading error is raised where its batch is due.
    """

    def __init__(
        self,
        stream: TokenStream,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        depth: int = 2,
    ) -> None:
        """Reads up to `depth` batches ahead."""
        self._stream = stream
        self._global_batch = global_batch
        self._share = (rank, world)
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(stream.rows,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Exception):
            self._stop.set()
            raise item
        self._stream.rows += self._global_batch
        return item

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread; batches read ahead are dropped."""
        self._stop.set()
        self._thread.join()

    def _read(self, position: int) -> None:
        while not self._stop.is_set():
            try:
                item: Batch | Exception = self._stream.batch(
                    position, self._global_batch, *self._share
                )
            except Exception as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            position += self._global_batch
