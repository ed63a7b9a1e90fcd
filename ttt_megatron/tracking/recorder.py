"""Writing a run's journal beside the training.

MLflow can log in the background by itself (`mlflow.config.enable_async_logging`). That is not
enough for a run of weeks: its queue lies in memory and is lost with a process that is killed, it
has no bound, a batch that failed is not tried again once MLflow's own few retries are over, its
thread is waited for at exit however long that takes, and a restarted process cannot know what had
arrived. Here the queue is bounded and empties into a file, and the file is what is uploaded.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable

from ttt_megatron.tracking.journal import Journal, Record

logger = logging.getLogger(__name__)

_QUEUE_SIZE = 10_000
_RETRY_SECONDS = 5.0

# A record, what makes some, or None for the end.
Item = Record | Callable[[], Iterable[Record]] | None


class Recorder:
    """The thread that writes. Nothing put here waits, and nothing that fails here raises."""

    def __init__(self, journal: Journal, grown: threading.Event) -> None:
        """`grown` is set whenever the journal has."""
        self._journal = journal
        self._grown = grown
        self._queue: queue.Queue[Item] = queue.Queue(_QUEUE_SIZE)
        self._pending: list[Record] = []
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="tracking-journal", daemon=True)
        self._thread.start()

    def put(self, item: Record | Callable[[], Iterable[Record]]) -> None:
        """Queues a record, or work that makes some, which the thread then does.

        If the disk has been stuck for so long that the queue is full, it is dropped: a step's
        figures are still in the metrics log, from which the journal is completed.
        """
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._warn("the disk is too slow, and some records were dropped")

    def close(self, patience: float) -> None:
        """Writes what is queued, for at most `patience` seconds."""
        self._closing.set()
        self.put_end()
        self._thread.join(patience)
        if self._thread.is_alive() or self._pending:
            self._warn("its last records could not be written")

    def put_end(self) -> None:
        """Asks the thread to end after what is queued now."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._warn("the disk is too slow, and some records were dropped")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: %s; training goes on", self._journal.path, why)

    def _work(self) -> None:
        ended = False
        while not ended:
            ended = self._take()
            try:
                if self._journal.append(self._pending):
                    self._grown.set()
                self._pending = []
            except OSError as error:
                self._warn(f"cannot be written ({error})")
                self._pending = self._pending[-_QUEUE_SIZE:]
                if not ended:
                    self._closing.wait(_RETRY_SECONDS)
            except (TypeError, ValueError) as error:  # no JSON: it will not be another time either
                self._warn(f"some records cannot be written ({error})")
                self._pending = []

    def _take(self) -> bool:
        """Waits for an item; all that are queued become pending. Whether the end was among them."""
        item = self._queue.get()
        while item is not None:
            self._pending += self._made(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return False
        return True

    def _made(self, item: Record | Callable[[], Iterable[Record]]) -> list[Record]:
        if isinstance(item, dict):
            return [item]
        try:
            return list(item())
        except Exception:
            logger.warning("what was to be logged could not be made", exc_info=True)
            return []


def now_ms() -> int:
    """The time as MLflow has it."""
    return int(time.time() * 1000)
