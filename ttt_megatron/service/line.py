"""Who waits for the model's thread, in the order of arrival."""

import threading

from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.jobs import Failed, Job, Operation

Item = Job | Operation


class Line:
    """Jobs and operations that nobody has begun yet.

    room: how many jobs there may be, those being answered included.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._changed = threading.Condition()
        self._items: list[Item] = []
        self._begun: list[Job] = []
        self.closed = False

    def put(self, item: Item) -> None:
        """Wait behind the others; RequestError 429 if too many do, 503 once closed."""
        with self._changed:
            if self.closed:
                raise RequestError(503, "the service is stopping", retry_after=10)
            jobs = len(self._begun) + sum(isinstance(other, Job) for other in self._items)
            if isinstance(item, Job) and jobs >= self._room:
                raise RequestError(
                    429,
                    f"{jobs} requests are being answered or wait (--max-batch and --max-queue): "
                    "try again later",
                    retry_after=1,
                )
            self._items.append(item)
            self._changed.notify()

    def put_removal(self, item: Operation, error: RequestError) -> None:
        """As `put`, and end all jobs with the same sessions, with an error."""
        with self._changed:
            for other in [*self._begun, *self._items]:
                if isinstance(other, Job) and other.names & item.names:
                    other.cancel(error)
            self.put(item)

    def items(self) -> list[Item]:
        """Everyone who waits, first come first."""
        with self._changed:
            return list(self._items)

    def begin(self, item: Item) -> None:
        """It is dealt with now: a job counts until `end`."""
        with self._changed:
            self._items.remove(item)
            if isinstance(item, Job):
                self._begun.append(item)

    def end(self, job: Job) -> None:
        """A job that was begun is over."""
        with self._changed:
            self._begun.remove(job)

    def waiting(self) -> int:
        """How many jobs wait."""
        return sum(isinstance(item, Job) for item in self.items())

    def wait(self) -> bool:
        """Wait until somebody is here; False once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self.closed)
            return bool(self._items)

    def close(self) -> None:
        """Take nobody in any more; those who wait fail, what is begun is cancelled."""
        with self._changed:
            self.closed = True
            for job in self._begun:
                job.cancel()
            stopping = RequestError(503, "the service is stopping", retry_after=10)
            for item in self._items:
                if isinstance(item, Job):
                    item.emit(Failed(stopping))
                else:
                    item.result.set_exception(stopping)
            self._items.clear()
            self._changed.notify()
