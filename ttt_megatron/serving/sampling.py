"""Choosing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen. Raises UserError for values that make no sense.

    temperature: logits are divided by it; 0 is greedy.
    top_k: only the k likeliest tokens; 0 is all.
    top_p: only the likeliest tokens whose probabilities first sum to at least p; 1 is all.
    repetition_penalty: logits of tokens seen before are divided by it where positive, multiplied
    where negative; 1 is none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wrong = {
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top-k": (self.top_k >= 0, "0 (all) or more"),
            "top-p": (0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            "repetition-penalty": (self.repetition_penalty > 0, "above 0; 1 is none"),
        }
        for name, (fine, allowed) in wrong.items():
            if not fine:
                value = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} {value:g}: give a number {allowed}")


class Sampler:
    """Chooses tokens for a batch of sequences, with a random generator of its own.

    Draws happen on the CPU, so that a seed means the same on every device. `vocab_size` leaves out
    ids from there on, for models with more rows than their tokenizer has tokens.
    """

    def __init__(
        self, settings: SamplingSettings, seed: int = 0, vocab_size: int | None = None
    ) -> None:
        self.settings = settings
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(seed)
        self._seen: Tensor | None = None

    def observe(self, tokens: Tensor, vocab_size: int) -> None:
        """Note [b, n] tokens as seen, for the repetition penalty."""
        if self.settings.repetition_penalty == 1.0:
            return
        if self._seen is None:
            self._seen = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.bool)
        self._seen.scatter_(1, tokens.cpu(), True)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of every sequence, and note it as seen: [b, V] → [b, 1] int64."""
        scores = logits.detach().to("cpu", torch.float64)
        if self._seen is not None:
            penalty = self.settings.repetition_penalty
            punished = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen, punished, scores)
        scores = scores[:, : self._vocab_size]
        if self.settings.temperature == 0:
            tokens = scores.argmax(dim=-1, keepdim=True)
        else:
            tokens = torch.multinomial(self.probabilities(scores), 1, generator=self._generator)
        self.observe(tokens, logits.shape[-1])
        return tokens.to(logits.device)

    def probabilities(self, scores: Tensor) -> Tensor:
        """What is drawn from at a temperature above 0: [b, V] → [b, V], rows summing to 1."""
        settings = self.settings
        ordered, order = (scores / settings.temperature).sort(dim=-1, descending=True, stable=True)
        if settings.top_k:
            ordered[:, settings.top_k :] = float("-inf")
        kept = ordered.softmax(dim=-1)
        if settings.top_p < 1:
            # A token stays if those before it have not reached p yet: the likeliest always does.
            kept = kept * (kept.cumsum(dim=-1) - kept < settings.top_p)
        probabilities = torch.zeros_like(kept).scatter_(-1, order, kept)
        return probabilities / probabilities.sum(dim=-1, keepdim=True)
