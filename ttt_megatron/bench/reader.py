"""Sessions of one learner, ready to be timed: a prompt read anew, and tokens decoded after it."""

from typing import Any

import torch
from torch import Tensor

from ttt_megatron.meta.learner import Learner
from ttt_megatron.serving.session import Session

_DECODED = 16


class Reader:
    """A learner's sessions: one that is prefilled anew, and one that goes on from a prompt.

    prompt [1, T] int64, whole chunks. `decoded` is how many tokens a run of `decode` takes.
    """

    def __init__(self, learner: Learner, prompt: Tensor) -> None:
        self.prompt = prompt
        self._learner = learner
        self._fresh = Session(learner)
        self._after: Session | None = None
        chunk = learner.inner.chunk_size
        # Tokens of the last chunk that decoding goes on without.
        self._open = -(-chunk // 2)
        self.decoded = max(1, min(_DECODED, chunk // 4))

    def prefill(self, _: Any) -> Tensor:
        """Reads the prompt from the start; the next token's logits, [1, V]."""
        self._fresh.reset()
        return self._fresh.prefill(self.prompt)

    @property
    def after(self) -> Session:
        """A session that has read the prompt, less what decoding fills its last chunk with."""
        if self._after is None:
            self._after = Session(self._learner)
            self._after.prefill(self.prompt[:, : -self._open])
        return self._after

    def begin(self) -> Session:
        """A copy to decode from."""
        return self.after.clone()

    def decode(self, session: Session) -> None:
        """Tokens one by one, greedily; none completes a chunk."""
        _decode(session, self.decoded)

    def full(self) -> Session:
        """A copy whose chunk is full: a session's inner step waits for the next token."""
        session = self.after.clone()
        session.prefill(self.prompt[:, -self._open :])
        return session

    def step(self, session: Session) -> Tensor:
        """One token, and the inner step that waited for it; logits [1, V]."""
        return _decode(session, 1)

    def almost_full(self) -> Session:
        """A copy whose chunk lacks one token."""
        session = self.after.clone()
        if self._open > 1:
            session.prefill(self.prompt[:, -self._open : -1])
        return session

    def over_end(self, session: Session) -> Tensor:
        """The last token of a chunk and the first of the next: an update falls on either."""
        return _decode(session, 2)


def _decode(session: Session, tokens: int) -> Tensor:
    logits = session.next_logits
    for _ in range(tokens):
        logits = session.prefill(logits.argmax(dim=-1, keepdim=True))
    return logits


def random_prompt(vocabulary: int, length: int, device: torch.device) -> Tensor:
    """Tokens drawn evenly, [1, length] int64."""
    return torch.randint(vocabulary, (1, length), device=device)
