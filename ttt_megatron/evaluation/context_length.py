"""The same tokens read under more and more context: loss of a document's last tokens.

Under a context of n tokens the last n tokens before the end are read, the first of them replaced by
BOS, as every document begins. What is predicted stays the same, so differences are paired.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.by_position import evaluate_by_position
from ttt_megatron.evaluation.formatting import mean_cell, mean_values
from ttt_megatron.evaluation.statistics import BucketSums, Mean, ratio_mean
from ttt_megatron.evaluation.task_report import Grid, TaskReport
from ttt_megatron.meta.learner import Learner

_FIRST = 256


def doubling_contexts(longest: int, last: int) -> list[int]:
    """256, 512, … and `longest` itself; none is shorter than `last`."""
    contexts, context = [], _FIRST
    while context < longest:
        contexts.append(context)
        context *= 2
    return [n for n in contexts if n >= last] + [longest]


def check_contexts(contexts: Sequence[int], last: int) -> None:
    """Raises UserError unless every context holds the inputs of the `last` measured tokens."""
    if last < 1:
        raise UserError(f"--last {last}: measure 1 token or more")
    if min(contexts) < last:
        raise UserError(
            f"a context of {min(contexts)} tokens cannot hold the --last {last} that are "
            "measured: give longer --contexts, or fewer tokens to measure"
        )


def losses_by_context(
    learner: Learner,
    documents: Sequence[Tensor],
    contexts: Sequence[int],
    last: int,
    *,
    inner_steps: bool | None = None,
    batch: int = 1,
    bos_id: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> BucketSums:
    """Sums over the last `last` tokens of `documents`, [documents, contexts].

    Documents are 1-D int64 tensors, each longer than every context. `on_progress` is called after
    each batch with the documents and positions it held.
    """
    shape = (len(documents), len(contexts))
    sums = BucketSums(np.zeros(shape), np.zeros(shape, dtype=np.int64))
    for column, context in enumerate(contexts):
        losses = evaluate_by_position(
            learner,
            (end_of(document, context, bos_id) for document in documents),
            inner_steps=inner_steps,
            batch=batch,
            bos_id=bos_id,
            on_progress=on_progress,
        )
        for row, (nll, counted) in enumerate(zip(losses.nll, losses.counted, strict=True)):
            sums.nll[row, column] = nll[-last:][counted[-last:]].sum()
            sums.counts[row, column] = counted[-last:].sum()
    return sums


def end_of(document: Tensor, context: int, bos_id: int) -> Tensor:
    """The last `context` + 1 tokens, the first being BOS: `context` inputs and targets."""
    tokens = document[len(document) - context - 1 :].clone()
    tokens[0] = bos_id
    return tokens


class ContextCurves:
    """Losses under each context of several ways of reading the same documents.

    Attributes:
        contexts: in tokens.
        curves: by name, sums [documents, contexts].
        reference: the curve that others are compared with.
    """

    def __init__(self, contexts: Sequence[int], curves: Mapping[str, BucketSums]) -> None:
        """The reference is the curve of that name, or else the first."""
        self.contexts = list(contexts)
        self.curves = dict(curves)
        self.reference = "reference" if "reference" in curves else next(iter(curves))

    @property
    def others(self) -> list[str]:
        """All curves but the reference."""
        return [name for name in self.curves if name != self.reference]

    def mean(self, curve: str, column: int) -> Mean:
        """Nats a token under one context."""
        sums = self.curves[curve]
        return ratio_mean(sums.nll[:, column], sums.counts[:, column])

    def difference(self, curve: str, column: int) -> Mean:
        """Nats a token more than the reference's under the same context, paired by document."""
        sums, reference = self.curves[curve], self.curves[self.reference]
        return ratio_mean(sums.nll[:, column] - reference.nll[:, column], sums.counts[:, column])

    def gain(self, curve: str, column: int) -> Mean:
        """Nats a token less than under the shortest context, paired by document."""
        sums = self.curves[curve]
        return ratio_mean(sums.nll[:, 0] - sums.nll[:, column], sums.counts[:, column])


def context_report(
    curves: ContextCurves, last: int, documents: Sequence[str], about: Mapping[str, object]
) -> TaskReport:
    """Table, figures and JSON of `curves`; `documents` are names."""
    names, reference = list(curves.curves), curves.reference
    columns = range(len(curves.contexts))
    rows = [
        [
            f"{curves.contexts[column]:,}",
            *(mean_cell(curves.mean(name, column)) for name in names),
            *(mean_cell(curves.difference(name, column), "+") for name in curves.others),
        ]
        for column in columns
    ]
    metrics = {
        f"{name}/{curves.contexts[column]}": curves.mean(name, column).mean
        for name in names
        for column in columns
    }
    metrics |= {
        f"{name}-minus-{reference}/{curves.contexts[column]}": curves.difference(name, column).mean
        for name in curves.others
        for column in columns
    }
    header = ["context", *names, *(f"{name} - {reference}" for name in curves.others)]
    return TaskReport(
        task="context",
        legend=(
            f"Nats a token over the last {last} tokens of {len(documents)} documents under growing "
            "context, ± standard error over documents; differences are paired by document."
        ),
        grids=[Grid(title="loss by context length", header=header, rows=rows)],
        values={
            "contexts": curves.contexts,
            "last": last,
            "reference": reference,
            "curves": {
                name: {
                    "means": [mean_values(curves.mean(name, column)) for column in columns],
                    "differences": [
                        mean_values(curves.difference(name, column)) for column in columns
                    ],
                    "gains": [mean_values(curves.gain(name, column)) for column in columns],
                    "document_nll": curves.curves[name].nll.tolist(),
                    "document_tokens": curves.curves[name].counts.tolist(),
                }
                for name in names
            },
            "documents": list(documents),
        },
        metrics=metrics,
        about=dict(about),
    )
