"""The HTTP routes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ttt_megatron import __version__
from ttt_megatron.service.answering import Events, answer, error_response
from ttt_megatron.service.body_limit import BodyLimit
from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.formats import ChatFormat, CompletionFormat, Format
from ttt_megatron.service.schemas import ChatRequest, CompletionRequest, TextRequest
from ttt_megatron.service.service import Service
from ttt_megatron.service.session_routes import session_routes

log = logging.getLogger(__name__)

SessionHeader = Annotated[str | None, Header(alias="X-Session")]


def build_app(service: Service, on_close: Callable[[list[str]], None]) -> FastAPI:
    """The application; `on_close` is told what could not be saved when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        on_close(await asyncio.to_thread(service.close))

    app = FastAPI(title="ttt-megatron", version=__version__, lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=service.options.max_body_bytes)
    app.include_router(session_routes(service))
    _handle_errors(app)
    started = int(time.time())

    @app.post("/v1/completions")
    async def completions(
        body: CompletionRequest, request: Request, x_session: SessionHeader = None
    ) -> Response:
        prompt = body.prompt
        if isinstance(prompt, list) and any(isinstance(part, str) for part in prompt):
            if len(prompt) != 1:
                raise RequestError(
                    400, f"prompt holds {len(prompt)} texts: send one a request", field="prompt"
                )
            prompt = str(prompt[0])
        form = CompletionFormat(service.served.name)
        return await _text(service, request, body, prompt, body.max_tokens, x_session, form)  # type: ignore[arg-type]

    @app.post("/v1/chat/completions")
    async def chat(
        body: ChatRequest, request: Request, x_session: SessionHeader = None
    ) -> Response:
        prompt = service.served.chat_prompt(
            [m.model_dump(exclude_none=True) for m in body.messages]
        )
        limit = (
            body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        )
        form = ChatFormat(service.served.name)
        return await _text(service, request, body, prompt, limit, x_session, form)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, started)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.served.name:
            raise RequestError(404, f"there is no model {name!r}: GET /v1/models lists it")
        return _model(service, started)

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker.alive
        status = {"status": "ok" if alive else "the model's thread has ended"}
        return JSONResponse(status, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


async def _text(
    service: Service,
    request: Request,
    body: TextRequest,
    prompt: str | list[int],
    max_tokens: int | None,
    header_session: str | None,
    form: Format,
) -> Response:
    events = Events()
    # Tokenizing a long text takes a while, in which others are to be heard.
    job = await asyncio.to_thread(
        service.job, body, prompt, max_tokens, header_session, events.emit
    )
    service.worker.submit(job)
    usage = body.stream_options is not None and body.stream_options.include_usage
    return await answer(request, job, events, form, stream=body.stream, usage=usage)


def _model(service: Service, created: int) -> dict[str, Any]:
    name = service.served.name
    return {"id": name, "object": "model", "created": created, "owned_by": "ttt-megatron"}


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return error_response(RequestError(400, f"the body is not JSON ({reason}): mend it"))
        field = place[0] if place else None
        message = f"{'.'.join(place) or 'the body'}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            message = f"{'.'.join(place)} is no field of this request: leave it out"
        return error_response(RequestError(400, message, field=field))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(RequestError(error.status_code, message))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(RequestError(500, f"the service failed on this request: {error}"))
