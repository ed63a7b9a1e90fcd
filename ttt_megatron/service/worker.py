"""The thread that runs the model: rows join and leave between two tokens.

Each turn reads one piece of waiting prompts and then one token in every row that writes, so a long
prompt holds up the others by a piece at a time.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ttt_megatron.service.admission import Admission
from ttt_megatron.service.departure import Departure
from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.jobs import Failed, Job, Operation
from ttt_megatron.service.line import Line
from ttt_megatron.service.metrics import Metrics
from ttt_megatron.service.options import ServiceOptions
from ttt_megatron.service.pool import SessionPool
from ttt_megatron.service.reading import Batch
from ttt_megatron.service.rows import Row
from ttt_megatron.service.served_model import ServedModel

log = logging.getLogger(__name__)

# Prompts are read in pieces of a chunk, or of several where chunks are shorter than this.
_PIECE_TOKENS = 256


class Worker:
    """Answers jobs and carries out operations on sessions, in a thread of its own."""

    def __init__(
        self, served: ServedModel, pool: SessionPool, options: ServiceOptions, metrics: Metrics
    ) -> None:
        self._served = served
        self._pool = pool
        self._metrics = metrics
        self._line = Line(options.max_batch + options.max_queue)
        self._departure = Departure(pool, self._line, metrics, options.save_every_request)
        self._admission = Admission(served, pool, options)
        self._rows: list[Row] = []
        self._reading, self._writing = Batch(served), Batch(served)
        chunk = served.chunk_size
        self._piece = chunk * max(1, _PIECE_TOKENS // chunk)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    # For every thread.

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """How many requests are being answered."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._line.waiting()

    def submit(self, job: Job) -> None:
        """Answer a job as soon as it can be; RequestError 429 or 503 if it cannot wait."""
        self._line.put(job)

    def operate(self, names: set[str], run: Callable[[], Any]) -> "Future[Any]":
        """Do something with sessions between two steps, after what came before for them."""
        operation = Operation(names=frozenset(names), run=run)
        self._line.put(operation)
        return operation.result

    def remove(self, name: str) -> "Future[Any]":
        """Remove a session and end the answers that are under way for it."""
        operation = Operation(names=frozenset({name}), run=lambda: self._pool.remove(name))
        gone = RequestError(409, f"session {name!r} was deleted while this request used it")
        self._line.put_removal(operation, gone)
        return operation.result

    def stop(self) -> None:
        """End all answers after the token that is being read, and take in no more."""
        self._line.close()

    def join(self) -> None:
        """Wait until all answers are over."""
        self._thread.join()

    # The model's thread.

    def _run(self) -> None:
        while self._rows or self._line.wait():
            try:
                self._turn()
            # Whatever it is, the service goes on with the next request.
            except Exception as error:
                log.exception("a turn failed")
                self._abandon(error)

    def _turn(self) -> None:
        self._admit()
        self._read()
        self._write()
        self._settle()

    def _admit(self) -> None:
        busy = {row.session.name for row in self._rows if row.session is not None}
        held = False
        for item in self._line.items():
            if isinstance(item, Job) and item.cancelled:
                self._line.begin(item)
                self._departure.finish(item, Failed(item.cancel_error or _UNHEARD))
            elif item.names & busy:
                busy |= item.names
            elif isinstance(item, Operation):
                self._line.begin(item)
                self._operate(item)
            else:
                busy |= item.names
                # Nobody passes one who waits for memory, or it might wait for ever.
                held = held or not self._begin(item)

    def _operate(self, operation: Operation) -> None:
        if not operation.result.set_running_or_notify_cancel():
            return
        try:
            operation.result.set_result(operation.run())
        except Exception as error:
            operation.result.set_exception(error)

    def _begin(self, job: Job) -> bool:
        """Whether the job no longer waits."""
        try:
            row = self._admission.row(job, self._rows)
        except Exception as error:
            if not isinstance(error, RequestError):
                log.error("a request could not be begun", exc_info=error)
                error = RequestError(500, f"the request could not be begun: {error}")
            self._line.begin(job)
            self._departure.finish(job, Failed(error))
            return True
        if row is None:
            return False
        self._line.begin(job)
        self._rows.append(row)
        self._count_bytes()
        return True

    def _read(self) -> None:
        """One piece of as many prompts as fit into one."""
        for row in self._rows:
            if row.unread and row.job.cancelled:
                row.unread = 0
                row.stop("cancelled")
        group: list[Row] = []
        longest = 0
        for row in self._rows:
            size = max(longest, min(row.unread, self._piece))
            if row.unread and (not group or size * (len(group) + 1) <= self._piece):
                group.append(row)
                longest = size
        self._reading.arrange(group)
        if not group:
            return
        pieces = [row.next_piece(self._piece) for row in self._reading.rows]
        began, rows = time.perf_counter(), list(self._reading.rows)
        self._reading.read(pieces)
        self._metrics.piece_seconds.observe(time.perf_counter() - began)
        self._metrics.tokens_read.inc(sum(map(len, pieces)))
        # Who was read goes behind the others.
        self._rows = [row for row in self._rows if row not in rows] + rows
        for row in rows:
            if not row.unread:
                self._choose(row)

    def _write(self) -> None:
        """One token of every row that has one to read."""
        for row in self._rows:
            if row.waits_to_begin:
                self._choose(row)
        rows = [row for row in self._rows if row.token is not None and not row.done]
        self._reading.arrange([row for row in self._reading.rows if row not in rows])
        self._writing.arrange(rows)
        if not rows:
            return
        began, rows = time.perf_counter(), list(self._writing.rows)
        self._writing.read([[row.token] for row in rows if row.token is not None])
        self._metrics.token_seconds.observe(time.perf_counter() - began)
        self._metrics.batch.observe(len(rows))
        for row in rows:
            self._choose(row)

    def _choose(self, row: Row) -> None:
        before = row.made
        row.choose()
        if row.made > before:
            self._metrics.tokens_written.inc()
            if row.made == 1:
                self._metrics.first_token.observe(time.monotonic() - row.job.created)

    def _settle(self) -> None:
        done = [row for row in self._rows if row.done]
        if not done:
            return
        for batch in (self._reading, self._writing):
            batch.arrange([row for row in batch.rows if not row.done])
        self._rows = [row for row in self._rows if not row.done]
        for row in done:
            self._departure.leave(row)
        self._count_bytes()

    def _count_bytes(self) -> None:
        self._pool.bytes_in_use = self._admission.bytes_of(self._rows)

    def _abandon(self, error: Exception) -> None:
        """Fail all rows; sessions whose state cannot be told are of no use any more."""
        rows, self._rows = self._rows, []
        self._reading, self._writing = Batch(self._served), Batch(self._served)
        for row in rows:
            row.fail(error)
            self._departure.leave(row)
        self._count_bytes()


_UNHEARD = RequestError(499, "the client has gone")
