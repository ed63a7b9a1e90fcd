"""From what happens in the model's thread to HTTP answers, whole or as they come."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.formats import Format
from ttt_megatron.service.jobs import Event, Failed, Finished, Job, Started, Text

# A comment line goes out so often where no token does: proxies close silent connections.
_SILENCE_SECONDS = 15.0


class Events:
    """What happens to one job, for the event loop that made this."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def emit(self, event: Event) -> None:
        """Tell of an event, from any thread."""
        # The loop may be closed already when the service stops.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        """The next event."""
        return await self._queue.get()


async def answer(
    request: Request, job: Job, events: Events, form: Format, *, stream: bool, usage: bool
) -> Response:
    """The answer to a job that was submitted; RequestError if it fails before any of it is sent.

    The job is cancelled as soon as the client has gone.
    """
    watch = asyncio.create_task(_cancel_when_gone(request.receive, job))
    try:
        event = await events.next()
        if isinstance(event, Started) and stream:
            return _Stream(job, events, form, usage=usage)
        text = []
        while not isinstance(event, Finished):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Text):
                text.append(event.text)
            event = await events.next()
        return JSONResponse(form.whole("".join(text), event))
    except asyncio.CancelledError:
        job.cancel()
        raise
    finally:
        watch.cancel()


class _Stream(Response):
    """Server-sent events, one for each piece of text."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: Events, form: Format, *, usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._events, self._form, self._usage = job, events, form, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_cancel_when_gone(receive, self._job))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._lines():
                body = f"{line}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._job.cancel()

    async def _lines(self) -> AsyncIterator[str]:
        form = self._form
        if first := form.first():
            yield _data(first)
        while True:
            try:
                event = await asyncio.wait_for(self._events.next(), _SILENCE_SECONDS)
            except TimeoutError:
                yield ": the model is reading"
                continue
            if isinstance(event, Text):
                yield _data(form.piece(event.text))
            elif isinstance(event, Failed):
                yield _data(error_body(event.error))
                return
            elif isinstance(event, Finished):
                yield _data(form.last(event))
                if self._usage:
                    yield _data(form.usage(event))
                yield "data: [DONE]"
                return


def error_body(error: RequestError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    told = {"message": error.message, "type": kind, "param": error.field, "code": error.status}
    return {"error": told}


def error_response(error: RequestError) -> JSONResponse:
    """An error as an HTTP answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _cancel_when_gone(receive: Callable[[], Any], job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _data(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}"
