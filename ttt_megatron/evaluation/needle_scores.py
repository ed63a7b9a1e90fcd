"""What a model makes of needle prompts: greedy answers, or likelihoods of given ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt_megatron.data.tokenizer import Tokenizer
from ttt_megatron.evaluation.needle_prompt import NeedlePrompt
from ttt_megatron.evaluation.needle_text import answer, is_found
from ttt_megatron.meta.learner import Learner
from ttt_megatron.serving.generation import generate
from ttt_megatron.serving.sampling import Sampler, SamplingSettings
from ttt_megatron.serving.session import Session


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model and how it reads; prompts of one length are read together."""

    learner: Learner
    tokenizer: Tokenizer
    inner_steps: bool

    @torch.no_grad()
    def exact(self, prompts: Sequence[NeedlePrompt], count: int) -> list[float]:
        """1 for each prompt whose value is in the `count` likeliest tokens that follow, or 0.

        A continuation ends where the model opens another document.
        """
        session = self._read(prompts)
        sampler = Sampler(SamplingSettings(temperature=0.0), 0, self.tokenizer.vocab_size)
        made: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for tokens in generate(session, sampler, count):
            for row in sorted(open_rows):
                token = int(tokens[row])
                if token == self.tokenizer.bos_id:
                    open_rows.discard(row)
                    continue
                made[row].append(token)
                if self._is_found(prompts[row], made[row]):
                    open_rows.discard(row)
            if not open_rows:
                break
        return [
            float(self._is_found(prompt, ids)) for prompt, ids in zip(prompts, made, strict=True)
        ]

    @torch.no_grad()
    def choice(self, prompts: Sequence[NeedlePrompt]) -> list[float]:
        """1 for each prompt whose value is likelier than all its distractors, or 0.

        Values that are equally likely share the 1, so that chance is 1/K with K values.
        """
        session = self._read(prompts)
        columns = zip(*([prompt.value, *prompt.distractors] for prompt in prompts), strict=True)
        likelihoods = torch.stack([self._log_likelihood(session, x) for x in columns], dim=1)
        best = likelihoods == likelihoods.max(dim=1, keepdim=True).values
        shares: list[float] = (best[:, 0].double() / best.sum(dim=1)).tolist()
        return shares

    def _read(self, prompts: Sequence[NeedlePrompt]) -> Session:
        session = Session(
            self.learner, len(prompts), self.inner_steps, bos_id=self.tokenizer.bos_id
        )
        session.prefill(torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])))
        return session

    def _log_likelihood(self, session: Session, values: Sequence[str]) -> Tensor:
        """Of one value a row, in nats: [b]. The session stays where it is."""
        rows = [torch.from_numpy(self.tokenizer.encode_array(answer(value))) for value in values]
        # Shorter answers are padded at their end, where nothing is counted.
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        counted = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        logits = session.next_logits.unsqueeze(1)
        if padded.shape[1] > 1:
            logits = torch.cat((logits, session.clone().read(padded[:, :-1])), dim=1)
        allowed = logits[..., : self.tokenizer.vocab_size].double().cpu()
        found = allowed.log_softmax(dim=-1).gather(-1, padded.unsqueeze(-1)).squeeze(-1)
        return (found * counted).sum(dim=1)

    def _is_found(self, prompt: NeedlePrompt, ids: list[int]) -> bool:
        return is_found(prompt.value, self.tokenizer.decode(ids))


def in_batches(
    prompts: Sequence[NeedlePrompt],
    batch: int,
    score: Callable[[Sequence[NeedlePrompt]], list[float]],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Scores of all prompts, `batch` of them read at once."""
    scores: list[float] = []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        scores += score(some)
        if on_progress is not None:
            on_progress(len(some), sum(len(prompt.tokens) for prompt in some))
    return scores
