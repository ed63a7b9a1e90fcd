"""One outer step's passes: forward and backward over the micro-batches, metrics over all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import LearnerOutput
from ttt_megatron.meta.part import Part
from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.parallel.context_step import context_forward_backward
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import learner_of, wait_for_parameters
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.training.parts import own_part


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


def forward_backward(
    ddp: DistributedDataParallel,
    micro_batches: Sequence[Batch],
    inner_lr: float,
    links: ContextLinks | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Leaves the mean gradient of the global batch in the DDP's buffers, reduced over the ranks.

    All micro-batches, on all ranks, have equally many sequences. With `links` every rank of them
    is given the same ones and reads its part. Returns each one's measurements, or this part's
    shares of them, as 0-d float64 tensors. Collective; the gradient buffers must be clear.
    """

    def run(batch: Batch, model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own = own_part(batch, links, learner_of(ddp))
        output: LearnerOutput = model(own.tokens, own.targets, own.mask, inner_lr, own.part)
        # Measured before a schedule divides the loss by the number of micro-batches, in place.
        return output.loss, _measure(output, own.part)

    wait_for_parameters(ddp)
    if links is not None:
        return context_forward_backward(
            ddp, links, len(micro_batches), lambda index: run(micro_batches[index], ddp)
        )

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
        loss, measured = run(next(batches), model)
        return loss, lambda loss: (loss, measured)

    with megatron_scope():
        measured: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=ddp,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1],
            micro_batch_size=len(micro_batches[0]),
        )
    return measured


def _measure(output: LearnerOutput, part: Part) -> dict[str, torch.Tensor]:
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
    measured: Sequence[dict[str, torch.Tensor]], stop: bool, groups: Groups
) -> tuple[Measurements, bool]:
    """Means over micro-batches and replicas, and whether any rank wants to stop. Collective.

    The parts' shares are added up. One reduction carries everything, so that all ranks see the same
    step as their last.
    """
    names = list(measured[0])
    rows = torch.stack([torch.stack([one[name] for name in names]) for one in measured])
    flag = torch.tensor([float(stop)], dtype=torch.float64, device=rows.device)
    total = groups.sum_shares(torch.cat([rows.mean(dim=0), flag])).tolist()
    means = {name: value / groups.data_size for name, value in zip(names, total[:-1], strict=True)}
    return Measurements(**means), total[-1] > 0
