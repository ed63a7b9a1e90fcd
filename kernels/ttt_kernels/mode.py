"""Which implementation the operations use."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plain: ContextVar[bool] = ContextVar("plain_definitions", default=False)


@contextmanager
def plain_definitions() -> Iterator[None]:
    """Within this context every operation runs as its plain definition.

    Slower and larger, but differentiable any number of times by autograd.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def uses_plain_definitions() -> bool:
    """True within `plain_definitions()`."""
    return _plain.get()
