"""When an answer is over: its session comes to rest, then the client hears of it."""

import logging
import time

from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.jobs import Failed, Finished, Job
from ttt_megatron.service.line import Line
from ttt_megatron.service.metrics import Metrics
from ttt_megatron.service.pool import SessionPool
from ttt_megatron.service.rows import Row

log = logging.getLogger(__name__)


class Departure:
    """Ends rows and jobs."""

    def __init__(
        self, pool: SessionPool, line: Line, metrics: Metrics, save_every_request: bool
    ) -> None:
        self._pool = pool
        self._line = line
        self._metrics = metrics
        self._save_every_request = save_every_request

    def leave(self, row: Row) -> None:
        """A row that is done, or has failed, and is in no batch any more."""
        error = row.job.cancel_error or row.error
        try:
            self._rest(row)
        except RequestError as problem:
            error = error or problem
        if row.error is not None:
            self._metrics.failures.inc()
        if error is not None:
            self.finish(row.job, Failed(error))
            return
        assert row.reason is not None
        self.finish(
            row.job,
            Finished(
                reason=row.reason,
                prompt_tokens=row.prompt_tokens,
                completion_tokens=row.made,
                session=None if row.session is None else row.session.describe(),
            ),
        )

    def finish(self, job: Job, event: Finished | Failed) -> None:
        """Tell whoever asked, and count it."""
        self._line.end(job)
        status = event.error.status if isinstance(event, Failed) else 200
        self._metrics.requests.labels(str(status)).inc()
        if job.cancelled:
            self._metrics.cancelled.inc()
        self._metrics.request_seconds.observe(time.monotonic() - job.created)
        job.emit(event)

    def _rest(self, row: Row) -> None:
        session, cache = row.session, row.cache
        if session is None:
            return
        if row.spoilt or cache is None:
            self._pool.fail(session, str(row.error or "its state was lost"))
        elif cache.positions[0] == 0:
            self._pool.discard(session)
        else:
            try:
                self._pool.rest(session, cache)
            except Exception as error:
                log.error("a session could not be kept", exc_info=error)
                self._pool.fail(session, str(error))
                raise RequestError(500, str(session.refused)) from error
            if self._save_every_request:
                self._pool.save(session)
