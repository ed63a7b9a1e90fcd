"""One outer step's passes: forward and backward over the micro-batches, metrics over all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import LearnerOutput
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import wait_for_parameters
from ttt_megatron.parallel.standins import megatron_scope


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
    ddp: DistributedDataParallel, micro_batches: Sequence[Batch], inner_lr: float
) -> list[dict[str, torch.Tensor]]:
    """Leaves the mean gradient of the global batch in the DDP's buffers, reduced over the ranks.

    All micro-batches, on all ranks, have equally many sequences. Returns each one's measurements
    as 0-d float64 tensors. Collective; the gradient buffers must be clear.
    """

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output: LearnerOutput = model(batch.tokens, batch.targets, batch.mask, inner_lr)
        # Before the schedule divides the loss by the number of micro-batches, in place.
        measured = _measure(output)
        return output.loss, lambda loss: (loss, measured)

    wait_for_parameters(ddp)
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


def _measure(output: LearnerOutput) -> dict[str, torch.Tensor]:
    measured = {
        "loss": output.loss,
        "first_chunk_loss": output.chunk_losses[:, 0],
        "last_chunk_loss": output.chunk_losses[:, -1],
        "inner_grad_norm": output.inner_grad_norms,
        "clipped_share": output.clipped_share,
        "drift": output.drift,
    }
    return {
        name: value.detach().double().mean()
        for name, value in measured.items()
        if value is not None
    }


def reduce_measurements(
    measured: Sequence[dict[str, torch.Tensor]], stop: bool, groups: Groups
) -> tuple[Measurements, bool]:
    """Means over micro-batches and replicas, and whether any rank wants to stop. Collective.

    One reduction carries both, so that all ranks see the same step as their last.
    """
    names = list(measured[0])
    rows = torch.stack([torch.stack([one[name] for name in names]) for one in measured])
    flag = torch.tensor([float(stop)], dtype=torch.float64, device=rows.device)
    total = groups.sum_replicas(torch.cat([rows.mean(dim=0), flag])).tolist()
    means = {name: value / groups.data_size for name, value in zip(names, total[:-1], strict=True)}
    return Measurements(**means), total[-1] > 0
