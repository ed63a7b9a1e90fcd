"""What the front end asks of the model's thread, and what it hears of it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ttt_megatron.service.errors import RequestError
from ttt_megatron.serving.sampling import SamplingSettings


@dataclass(frozen=True)
class Started:
    """The request is being answered: nothing but the model can fail from here on."""


@dataclass(frozen=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The answer is complete.

    reason: stop, length or cancelled. session: what `describe` tells of the session, if one.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    session: dict[str, Any] | None


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: RequestError


Event = Started | Text | Finished | Failed


@dataclass(kw_only=True, eq=False)
class Job:
    """One request for text.

    prompt: ids to read; opening: what is read before them at a document's beginning, if anything.
    session: its name, None for none. emit is called in the model's thread with what happens.
    """

    prompt: list[int]
    opening: list[int]
    max_tokens: int
    sampling: SamplingSettings
    seed: int
    stops: tuple[str, ...]
    session: str | None
    emit: Callable[[Event], None]
    created: float = field(default_factory=time.monotonic)
    short_of_memory_since: float | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)
    cancel_error: RequestError | None = None

    @property
    def names(self) -> frozenset[str]:
        """The sessions it needs."""
        return frozenset() if self.session is None else frozenset((self.session,))

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the rest of the answer."""
        return self._cancelled.is_set()

    def cancel(self, error: RequestError | None = None) -> None:
        """End the answer after the token that is being read; with an error, as failed."""
        self.cancel_error = self.cancel_error or error
        self._cancelled.set()


@dataclass(kw_only=True, eq=False)
class Operation:
    """Something to do with sessions between two steps of the model, once none is in use."""

    names: frozenset[str]
    run: Callable[[], Any]
    result: "Future[Any]" = field(default_factory=Future)
