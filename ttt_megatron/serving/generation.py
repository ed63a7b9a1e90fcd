"""Decoding: sample, read what was sampled, and so on."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ttt_megatron.serving.sampling import Sampler
from ttt_megatron.serving.session import Session

# Bytes of the longest UTF-8 character, hence the most tokens one can be spread over.
_CHARACTER_TOKENS = 4


def generate(session: Session, sampler: Sampler, count: int) -> Iterator[Tensor]:
    """Yield up to `count` tokens [b, 1] that continue what the session has read.

    The session reads each token when the iterator is asked for more, so inner steps go on.
    """
    for _ in range(count):
        tokens = sampler(session.next_logits)
        yield tokens
        session.prefill(tokens)


class TextStream:
    """Turns tokens into text as they come; `decode` turns ids into text.

    A character that is spread over several tokens comes out once it is complete. Decoders treat
    the start of a text differently, so the tokens before are decoded along and cut off again.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self._waiting.append(token)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._waiting) < _CHARACTER_TOKENS:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """What is left: an incomplete character comes out as U+FFFD."""
        return self._take(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._waiting])[len(before) :]

    def _take(self, text: str) -> str:
        if self._waiting:
            self._context, self._waiting = self._waiting, []
        return text
