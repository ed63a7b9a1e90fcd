"""What is measured in an outer step, and its reduction over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ttt_megatron.meta.learner import LearnerOutput
from ttt_megatron.meta.part import Part
from ttt_megatron.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Means over a step's sequences, all replicas'; None where there are no inner steps.

    Losses in nats a token; `clipped_share` of the inner steps; `drift` is ‖W_N − W_0‖/‖W_0‖.
    """

    loss: float
    first_chunk_loss: float
    last_chunk_loss: float
    inner_grad_norm: float | None = None
    clipped_share: float | None = None
    drift: float | None = None


def measure(output: LearnerOutput, part: Part) -> dict[str, torch.Tensor]:
    """This part's shares of the means over sequences and inner steps; over the parts they add up.

    All parts have the same names, though the last may have taken no step.
    """
    chunks = output.chunk_losses
    none = chunks.new_zeros(())
    measured = {
        "loss": output.loss,
        "first_chunk_loss": chunks[:, 0] if part.is_first else none,
        "last_chunk_loss": chunks[:, -1] if part.is_last else none,
    }
    if output.drift is not None:
        measured["drift"] = output.drift if part.is_last else none
        length = output.token_nll.shape[1]
        steps = chunks.shape[1] * part.whole_length(length) // length - 1
        if steps:
            norms, clipped = output.inner_grad_norms, output.clipped_share
            share = 0.0 if norms is None else norms.shape[1] / steps
            measured["inner_grad_norm"] = none if norms is None else norms * share
            measured["clipped_share"] = none if clipped is None else clipped * share
    return {name: value.detach().double().mean() for name, value in measured.items()}


def reduce_measurements(
    measured: Sequence[dict[str, torch.Tensor]], flags: Sequence[bool], groups: Groups
) -> tuple[Measurements, list[bool]]:
    """Means over micro-batches and replicas, and which flags are set on any rank. Collective.

    The parts' shares are added up; a pipeline stage that measured nothing adds nothing. One
    reduction carries everything, so that all ranks see the same step as their last.
    """
    names = [field.name for field in fields(Measurements)]
    # Per name the mean and whether there is one, and at the end the flags.
    row = torch.zeros(2 * len(names) + len(flags), dtype=torch.float64, device=groups.device)
    for place, name in enumerate(names):
        if measured and name in measured[0]:
            row[2 * place] = torch.stack([one[name] for one in measured]).mean()
            row[2 * place + 1] = 1.0
    row[2 * len(names) :] = row.new_tensor(flags)
    total = groups.sum_shares(row).tolist()
    means = {
        name: total[2 * place] / groups.data_size
        for place, name in enumerate(names)
        if total[2 * place + 1] > 0
    }
    return Measurements(**means), [count > 0 for count in total[2 * len(names) :]]
