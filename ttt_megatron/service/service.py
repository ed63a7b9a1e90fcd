"""The service behind the HTTP routes: checks what is asked, and hands it to the model's thread."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.jobs import Event, Job
from ttt_megatron.service.metrics import Metrics
from ttt_megatron.service.options import ServiceOptions
from ttt_megatron.service.pool import SessionPool
from ttt_megatron.service.schemas import TextRequest
from ttt_megatron.service.served_model import ServedModel
from ttt_megatron.service.session import checked_name
from ttt_megatron.service.session_store import SessionStore
from ttt_megatron.service.worker import Worker
from ttt_megatron.serving.sampling import SamplingSettings

_DEFAULT_TOKENS = 16


class Service:
    """A served model with its sessions, its thread and its counters."""

    def __init__(self, served: ServedModel, options: ServiceOptions) -> None:
        """Finds the sessions in the session folder; UserError if that cannot be used."""
        self.served = served
        self.options = options
        self.metrics = Metrics()
        self._store = None if options.session_dir is None else SessionStore(options.session_dir)
        self.pool = SessionPool(
            served,
            options.memory,
            self._store,
            lambda kind: self.metrics.moved.labels(kind).inc(),
        )
        self.worker = Worker(served, self.pool, options, self.metrics)
        self.metrics.watch(self._gauges)

    def start(self) -> None:
        """Begin to answer."""
        self.worker.start()

    def close(self) -> list[str]:
        """End all answers and save all sessions; returns what could not be saved, and why."""
        self.worker.stop()
        self.worker.join()
        problems = self.pool.save_all()
        if self._store is not None:
            self._store.close()
        return problems

    def job(
        self,
        body: TextRequest,
        prompt: str | list[int],
        max_tokens: int | None,
        header_session: str | None,
        emit: Callable[[Event], None],
    ) -> Job:
        """What a request asks for; RequestError 400 or 404 if it cannot be had."""
        name = self._session_name(body.session, header_session)
        if body.model is not None and body.model != self.served.name:
            raise RequestError(
                404,
                f"there is no model {body.model!r}: this service has {self.served.name!r}",
                field="model",
            )
        unsupported = body.unsupported()
        if unsupported is not None:
            raise RequestError(
                400, f"{unsupported} is not supported: leave it out", field=unsupported
            )
        if len(body.stops) > 16 or not all(0 < len(stop) <= 1000 for stop in body.stops):
            raise RequestError(
                400,
                "stop holds more than 16 strings, or one of none or over 1000 letters: give "
                "fewer, shorter ones",
                field="stop",
            )
        from_text = isinstance(prompt, str)
        opens = from_text and self.served.bos_id is not None
        return Job(
            prompt=self._ids(prompt),
            opening=[self.served.bos_id] if opens and self.served.bos_id is not None else [],
            max_tokens=_DEFAULT_TOKENS if max_tokens is None else max_tokens,
            sampling=SamplingSettings(
                temperature=_temperature(body.temperature),
                top_k=body.top_k or 0,
                top_p=1.0 if body.top_p is None else body.top_p,
            ),
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            stops=body.stops,
            session=name,
            emit=emit,
        )

    async def operate(self, names: set[str], run: Callable[[], Any]) -> Any:
        """Have the model's thread do something with sessions."""
        return await asyncio.wrap_future(self.worker.operate(names, run))

    async def remove(self, name: str) -> None:
        """Remove a session; RequestError 404 if there is none."""
        await asyncio.wrap_future(self.worker.remove(name))

    def _session_name(self, body: str | None, header: str | None) -> str | None:
        if body is not None and header is not None and body != header:
            raise RequestError(
                400,
                f"session is {body[:120]!r} and the header X-Session {header[:120]!r}: give one",
                field="session",
            )
        name = body if body is not None else header
        return None if name is None else checked_name(name)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise RequestError(
                    400, "prompt holds half of a surrogate pair: send UTF-8 text", field="prompt"
                ) from None
            return self.served.encode(prompt)
        vocab_size = self.served.model.config.vocab_size
        wrong = next((i for i in prompt if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise RequestError(
                400,
                f"prompt holds the token {wrong}, and the vocabulary has {vocab_size} ids",
                field="prompt",
            )
        return prompt

    def _gauges(self) -> dict[str, dict[str, float]]:
        count: dict[str, float] = {"memory": 0, "disk": 0, "in use": 0, "refused": 0}
        held: dict[str, float] = {"memory": 0, "disk": 0}
        for session in self.pool.all():
            told = session.describe()
            count[told["where"]] += 1
            held["memory"] += told["memory_bytes"]
            held["disk"] += told["file_bytes"]
        return {
            "ttt_sessions": count,
            "ttt_session_bytes": held,
            "ttt_reserved_bytes": {"": self.pool.bytes_in_use},
            "ttt_requests_waiting": {"": self.worker.waiting},
            "ttt_requests_active": {"": self.worker.active},
        }


def _temperature(asked: float | None) -> float:
    # Below, logits divided by it are no numbers any more, and the likeliest token wins anyway.
    return 1.0 if asked is None else asked if asked > 1e-6 else 0.0
