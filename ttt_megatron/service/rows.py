"""One request while it is being answered."""

import logging

import torch
from torch import Tensor

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.service.answer_text import AnswerText
from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.jobs import Job, Text
from ttt_megatron.service.served_model import ServedModel
from ttt_megatron.service.session import Session
from ttt_megatron.serving.sampling import Sampler

log = logging.getLogger(__name__)


class Row:
    """A request with the state of its text.

    unread: how many tokens of the prompt are left. token: what was chosen and is to be read next.
    cache: the state, while no batch has it. reason: why the answer is over, once it is. error: why
    there is none. spoilt: whether its state is of no use. reserved: bytes it may take.
    """

    def __init__(
        self,
        served: ServedModel,
        job: Job,
        session: Session | None,
        cache: TTTE2ECache,
        prompt: list[int],
        reserved: int,
    ) -> None:
        self.job = job
        self.session = session
        self.cache: TTTE2ECache | None = cache
        self.prompt_tokens = len(prompt)
        self.unread = len(prompt)
        self.reserved = reserved
        self.token: int | None = None
        self.made = 0
        self.logits: Tensor | None = None
        self.reason: str | None = None
        self.error: RequestError | None = None
        self.spoilt = False
        self._prompt = prompt
        self._ends = served.ends
        self._text = AnswerText(served.decode, job.stops)
        self._sampler = Sampler(job.sampling, job.seed, served.vocab_size)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do; a session still reads the last token of its answer."""
        if self.error is not None:
            return True
        return self.reason is not None and (self.token is None or self.session is None)

    @property
    def needs_state(self) -> bool:
        """Whether what it read will be asked for again."""
        return self.session is not None or not self.done

    @property
    def waits_to_begin(self) -> bool:
        """Whether it has nothing to read and has not chosen yet: a session that just goes on."""
        return not self.unread and self.made == 0 and self.token is None and not self.done

    def take_cache(self) -> TTTE2ECache:
        """The state, which is somebody else's from now on."""
        cache, self.cache = self.cache, None
        assert cache is not None
        return cache

    def next_piece(self, size: int) -> list[int]:
        """What of the prompt is read next; it counts as read."""
        start = self.prompt_tokens - self.unread
        piece = self._prompt[start : start + size]
        self.unread -= len(piece)
        return piece

    def reached(self, position: int, steps: int) -> None:
        """Show how far reading has come."""
        if self.session is not None and self.error is None:
            self.session.unsaved = True
            self.session.position, self.session.steps = position, steps

    def choose(self) -> None:
        """Choose the next token by `logits`, unless the answer is over; sends text out."""
        self.token = None
        if self.reason is not None or self.error is not None:
            return
        if self.job.cancelled:
            self.stop("cancelled")
        elif self.made == self.job.max_tokens:
            self.stop("length")
        else:
            try:
                self._choose()
            # What goes wrong in choosing is this row's alone.
            except Exception as error:
                self.fail(error)

    def stop(self, reason: str) -> None:
        """The answer is over; what text is left goes out."""
        if self.reason is None:
            self.reason = reason
            self._send(self._text.finish())

    def fail(self, error: Exception) -> None:
        """The model failed on this row."""
        if self.error is None:
            log.error("a request failed in the model", exc_info=error)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.error = RequestError(500, f"the model failed on this request: {reason}")

    def _choose(self) -> None:
        assert self.logits is not None
        if not bool(torch.isfinite(self.logits).all()):
            self.spoilt = True
            self.error = RequestError(500, "the model's logits are not finite numbers")
            return
        token = int(self._sampler(self.logits.unsqueeze(0)))
        if token in self._ends:
            self.stop("stop")
            return
        self.token, self.made = token, self.made + 1
        self._send(self._text.push(token))
        if self._text.stopped:
            self.reason = "stop"
        elif self.made == self.job.max_tokens:
            self.stop("length")

    def _send(self, text: str) -> None:
        if text:
            self.job.emit(Text(text))
