"""Refuses bodies that are too large, before they are in memory."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttt_megatron.service.answering import error_response
from ttt_megatron.service.errors import RequestError


class BodyLimit:
    """ASGI middleware that answers 413 to bodies of more than `limit` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        read = int(length) if length.isdigit() else 0
        if read <= self._limit:
            read = 0

            async def counted() -> Message:
                nonlocal read
                message = await receive()
                read += len(message.get("body", b""))
                # The application gives up as if the client had, and is not heard any more.
                return message if read <= self._limit else {"type": "http.disconnect"}

            async def unless_refused(message: Message) -> None:
                if read <= self._limit:
                    await send(message)

            try:
                await self._app(scope, counted, unless_refused)
            except Exception:
                if read <= self._limit:
                    raise
        if read > self._limit:
            await self._refusal()(scope, receive, send)

    def _refusal(self) -> JSONResponse:
        return error_response(
            RequestError(
                413,
                f"the body has more than {self._limit:,} bytes (--max-body): send a long text to "
                "a session in parts",
            )
        )
