"""Validation loss while training and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.validation import ValidationSequences, validation_sequences
from ttt_megatron.meta.part import Part
from ttt_megatron.parallel.pipeline import read_in_stages
from ttt_megatron.training.callbacks.base import Callback
from ttt_megatron.training.parts import own_parts

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer


class ValidationLoss(Callback):
    """Mean loss over the starts of held-out documents, inner steps on and fully warmed.

    Every `training.eval_interval` steps and at the end, on `training.eval_sequences` documents of
    at least a sequence's length, shared out among the replicas; all ranks take part. Off where the
    number of sequences is 0.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raises UserError if sequences are asked for and the data has none."""
        training, data = config.training, config.data
        self._interval = training.eval_interval
        self._sequences: ValidationSequences | None = None
        if training.eval_sequences:
            dataset = open_dataset(data.path, "validation")
            self._sequences = validation_sequences(
                dataset, data.sequence_length, training.eval_sequences
            )

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Evaluates at the interval; the last step's turn is at the end."""
        if self._interval and record.step % self._interval == 0 and not trainer.finished:
            self._evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Evaluates the finished model; a run that was stopped goes on later."""
        if trainer.finished:
            self._evaluate(trainer)

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer) -> None:
        if self._sequences is None:
            return
        config, groups = trainer.config, trainer.parts.groups
        trainer.parts.engine.settle()
        learners = trainer.parts.engine.learners
        num_parts = groups.links.num_parts if groups.links is not None else 1
        micro = config.training.micro_batch_size
        count = len(self._sequences)
        # Loss, first chunk's, last chunk's, summed over sequences, and their number.
        sums = torch.zeros(4, dtype=torch.float64, device=groups.device)
        for first in range(groups.data_rank * micro, count, groups.data_size * micro):
            batch = self._sequences.batch(first, micro).to(groups.device)
            for own in own_parts(batch, groups.links, learners[-1]):
                output = read_in_stages(
                    learners, groups.stages, own.tensors, config.inner.lr, own.part
                )
                trainer.alive()
                if output is not None:
                    sums += _sums(output.chunk_losses.double(), own.part, num_parts)
        groups.settle()
        loss, first_chunk, last_chunk, total = groups.sum_shares(sums).tolist()
        trainer.report(
            {
                "validation_loss": loss / total,
                "validation_first_chunk_loss": first_chunk / total,
                "validation_last_chunk_loss": last_chunk / total,
            }
        )


def _sums(chunks: torch.Tensor, part: Part, num_parts: int) -> torch.Tensor:
    """A part's shares, from its chunk losses [b, N], of what a batch adds to the sums: [4]."""
    sums = chunks.new_zeros(4)
    sums[0] = chunks.mean(dim=1).sum() / num_parts
    if part.is_first:
        sums[1], sums[3] = chunks[:, 0].sum(), len(chunks)
    if part.is_last:
        sums[2] = chunks[:, -1].sum()
    return sums
