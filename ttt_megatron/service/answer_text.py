"""From tokens to the text a client gets: whole characters, up to a stop string."""

from collections.abc import Callable, Sequence

from ttt_megatron.serving.generation import TextStream


class AnswerText:
    """Turns tokens into text as they come, and ends before the first stop string.

    Text that may be the beginning of a stop string comes out once it is known not to be.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(decode)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text this token lets out; `stopped` tells that a stop string was completed."""
        return self._release(self._stream.push(token))

    def finish(self) -> str:
        """The rest; an incomplete character comes out as U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._stream.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
