"""Decoded text, judged by the loss that another model has on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt_megatron.data.tokenizer import Tokenizer
from ttt_megatron.evaluation.by_position import evaluate_by_position
from ttt_megatron.evaluation.formatting import mean_cell, mean_values
from ttt_megatron.evaluation.statistics import Mean, ratio_mean
from ttt_megatron.evaluation.task_report import Grid, TaskReport
from ttt_megatron.meta.learner import Learner
from ttt_megatron.serving.sampling import Sampler, SamplingSettings
from ttt_megatron.serving.session import Session

PAPER_SAMPLING = SamplingSettings(temperature=1.0, top_p=0.95, repetition_penalty=1.1)
"""Of the decoding evaluation in arXiv 2512.23675."""

OnProgress = Callable[[int, int], None]


@torch.no_grad()
def decode(
    learner: Learner,
    tokenizer: Tokenizer,
    prompts: Tensor,
    count: int,
    *,
    inner_steps: bool,
    sampling: SamplingSettings = PAPER_SAMPLING,
    batch: int = 1,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Continue prompts [n, P] by `count` tokens each: [n, count] int64, on the CPU.

    BOS is never drawn, so all continuations have the same length. Batch i draws with seed + i.
    """
    made = []
    for number, rows in enumerate(prompts.split(batch)):
        session = Session(learner, len(rows), inner_steps, bos_id=tokenizer.bos_id)
        sampler = Sampler(sampling, seed + number, tokenizer.vocab_size)
        sampler.observe(rows, learner.model.config.vocab_size or 0)
        logits = session.prefill(rows)
        tokens = []
        for _ in range(count):
            logits[:, tokenizer.bos_id] = float("-inf")
            tokens.append(sampler(logits))
            logits = session.prefill(tokens[-1])
        made.append(torch.cat(tokens, dim=1).cpu())
        if on_progress is not None:
            on_progress(len(rows), rows.numel() + made[-1].numel())
    return torch.cat(made)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Another model. Text of another tokenizer is read in the judge's own tokens."""

    learner: Learner
    tokenizer: Tokenizer
    inner_steps: bool
    batch: int = 1

    def judge(
        self,
        prompts: Tensor,
        continuations: Tensor,
        tokenizer: Tokenizer,
        *,
        retokenize: bool,
        on_progress: OnProgress | None = None,
    ) -> "Judgement":
        """Loss of continuations [n, D] behind prompts [n, P], both tokens of `tokenizer`.

        Without `retokenize`, which is for equal tokenizers, the tokens are read as they are.
        """
        texts = [tokenizer.decode(row) for row in continuations.numpy()]
        if retokenize:
            encode = self.tokenizer.encode_array
            before = [
                self.tokenizer.encode_document(tokenizer.decode(row)) for row in prompts.numpy()
            ]
            after = [encode(text) for text in texts]
        else:
            before, after = list(prompts.numpy()), list(continuations.numpy())
        documents = [
            torch.from_numpy(np.concatenate(pair)) for pair in zip(before, after, strict=True)
        ]
        losses = evaluate_by_position(
            self.learner,
            documents,
            inner_steps=self.inner_steps,
            batch=self.batch,
            bos_id=self.tokenizer.bos_id,
            on_progress=on_progress,
        )
        counts = [len(row) for row in after]
        return Judgement(
            nll=np.array([x[len(x) - n :].sum() for x, n in zip(losses.nll, counts, strict=True)]),
            tokens=np.array(counts),
            text_bytes=np.array([len(text.encode("utf-8")) for text in texts]),
            texts=texts,
        )


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of n continuations: the judge's loss in nats, its tokens, and bytes of the text."""

    nll: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray
    texts: list[str]

    def mean(self, by_byte: bool) -> Mean:
        """Nats a byte, or a token of the judge's."""
        return ratio_mean(self.nll, self.text_bytes if by_byte else self.tokens)

    def difference(self, other: "Judgement", by_byte: bool) -> Mean:
        """Nats a byte or token more than the other's, paired by prompt.

        Of unequal counts it is the difference of each prompt's mean.
        """
        counts = "text_bytes" if by_byte else "tokens"
        own, others = getattr(self, counts), getattr(other, counts)
        known = (own > 0) & (others > 0)
        gaps = self.nll[known] / own[known] - other.nll[known] / others[known]
        return ratio_mean(gaps, np.ones(len(gaps)))


HELD_OUT = "held-out text"


def decoding_report(
    judgements: Mapping[str, Judgement],
    documents: Sequence[str],
    *,
    prefill: int,
    decoded: int,
    by_byte: bool,
    about: Mapping[str, object],
) -> TaskReport:
    """Table, figures and JSON; the text that did follow is judged as `HELD_OUT`."""
    unit = "byte" if by_byte else "token"
    first, true = next(iter(judgements.values())), judgements[HELD_OUT]
    rows = [
        [
            name,
            mean_cell(each.mean(by_byte)),
            mean_cell(each.difference(true, by_byte), "+") if each is not true else "",
            mean_cell(each.difference(first, by_byte), "+") if each is not first else "",
        ]
        for name, each in judgements.items()
    ]
    first_name = next(iter(judgements))
    header = ["decoded by", f"nats a {unit}", f"- {HELD_OUT}", f"- {first_name}"]
    return TaskReport(
        task="decode",
        legend=(
            f"The judge's loss, in nats a {unit}, on {decoded:,} tokens decoded behind {prefill:,} "
            f"of {len(documents)} documents (temperature {PAPER_SAMPLING.temperature:g}, top-p "
            f"{PAPER_SAMPLING.top_p:g}, repetition penalty {PAPER_SAMPLING.repetition_penalty:g}), "
            "± standard error over documents; differences are paired by document."
        ),
        grids=[Grid(title="decoded text under the judge", header=header, rows=rows)],
        values={
            "prefill": prefill,
            "decoded": decoded,
            "unit": unit,
            "judgements": {
                name: {
                    "mean": mean_values(each.mean(by_byte)),
                    "minus_held_out": mean_values(each.difference(true, by_byte)),
                    "nll": each.nll.tolist(),
                    "tokens": each.tokens.tolist(),
                    "bytes": each.text_bytes.tolist(),
                    "texts": each.texts,
                }
                for name, each in judgements.items()
            },
            "documents": list(documents),
        },
        metrics={name.replace(" ", "_"): x.mean(by_byte).mean for name, x in judgements.items()},
        about=dict(about),
    )
