"""When a request begins: its session is free, there is a place, and memory for its state."""

import time
from collections.abc import Sequence

from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.footprint import row_bytes
from ttt_megatron.service.jobs import Job, Started
from ttt_megatron.service.options import ServiceOptions
from ttt_megatron.service.pool import SessionPool
from ttt_megatron.service.rows import Row
from ttt_megatron.service.served_model import ServedModel


class Admission:
    """Makes rows of jobs."""

    def __init__(self, served: ServedModel, pool: SessionPool, options: ServiceOptions) -> None:
        self._served = served
        self._pool = pool
        self._options = options

    def row(self, job: Job, rows: Sequence[Row]) -> Row | None:
        """A row beside `rows`, or None while there is no place for it.

        Raises RequestError if there will be none, or the job cannot be answered.
        """
        session = None if job.session is None else self._pool.find(job.session)
        if session is not None and session.refused is not None:
            raise RequestError(409, session.refused)
        prompt = job.prompt if session is not None else [*job.opening, *job.prompt]
        self._check_prompt(prompt, begins=session is None)
        if len(rows) >= self._options.max_batch:
            return None
        read = 0 if session is None else session.position
        reserved = row_bytes(
            self._served.model.config,
            self._served.model.dtype,
            read + len(prompt) + job.max_tokens,
            learns=self._served.learns,
        )
        more = self._bytes(rows, reserved) - self.bytes_of(rows)
        if not self._pool.make_room(more, session):
            self._wait_for_memory(job, reserved, rows)
            return None
        if session is not None:
            cache = self._pool.take(session)
        else:
            cache = self._served.new_cache()
            session = None if job.session is None else self._pool.begin(job.session)
        row = Row(self._served, job, session, cache, prompt, reserved)
        if not prompt:
            row.logits = self._served.logits(cache)
        job.emit(Started())
        return row

    def bytes_of(self, rows: Sequence[Row]) -> int:
        """What rows may take: in one cache all have the room of the longest."""
        return len(rows) * max((row.reserved for row in rows), default=0)

    def _bytes(self, rows: Sequence[Row], reserved: int) -> int:
        return (len(rows) + 1) * max([reserved, *(row.reserved for row in rows)])

    def _check_prompt(self, prompt: list[int], *, begins: bool) -> None:
        if begins and not prompt:
            raise RequestError(
                400, "prompt is empty, and there is nothing to go on from: give one", field="prompt"
            )
        if len(prompt) > self._options.max_prompt_tokens:
            raise RequestError(
                400,
                f"prompt has {len(prompt):,} tokens, and --max-prompt-tokens is "
                f"{self._options.max_prompt_tokens:,}: give it to a session in parts",
                field="prompt",
            )

    def _wait_for_memory(self, job: Job, reserved: int, rows: Sequence[Row]) -> None:
        """RequestError 503 if waiting is of no use, or was long enough."""
        now = time.monotonic()
        job.short_of_memory_since = job.short_of_memory_since or now
        if not rows or now - job.short_of_memory_since >= self._options.max_wait:
            raise self._pool.no_room(reserved)
