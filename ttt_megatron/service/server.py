"""From a loaded model to a listening process, and to its orderly end."""

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from ttt_megatron.errors import UserError
from ttt_megatron.service.api import build_app
from ttt_megatron.service.service import Service


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, not listening yet; UserError if it is not to be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be used ({reason}): give another port, or end "
            "what uses it"
        ) from None
    return bound


def serve(service: Service, bound: socket.socket, ready: Callable[[str], None]) -> list[str]:
    """Answer requests until SIGINT or SIGTERM; returns what could not be saved, in words.

    `ready` is told the service's URL once it listens.
    """
    problems: list[str] = []
    app = build_app(service, problems.extend)
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=60, lifespan="on"
    )
    try:
        _Server(config, service.worker.stop, lambda: ready(url)).run(sockets=[bound])
    except OSError as error:
        raise UserError(
            f"--port {port} cannot be listened at ({error.strerror}): give another"
        ) from None
    return problems


class _Server(uvicorn.Server):
    """Ends answers under way when it is told to stop, and then returns."""

    def __init__(
        self, config: uvicorn.Config, stop: Callable[[], None], ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._stop, self._ready = stop, ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGINT and SIGTERM, which the process then does not die of."""
        handlers = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers first: connections close when they are over."""
        self._stop()
        await super().shutdown(sockets)
