"""Training steps with context parallelism inside mcore's DDP: what one process computes."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from context_case import Case, micro_batch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from ttt_megatron.config import OptimizerConfig, ParallelConfig
from ttt_megatron.parallel.context import context_part, own_part
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.context_step import context_forward_backward
from ttt_megatron.parallel.launcher import launch
from ttt_megatron.parallel.replica import replicate, settle_parameters, wait_for_parameters
from ttt_megatron.parallel.standins import install_standins, megatron_scope
from ttt_megatron.training.optimizer import build_optimizer

CASE = Case(inner={"clip": 0.5})
SEQUENCES = 6
# Several buckets, so that reductions start while backward passes still run.
BUCKET = 700

Course = tuple[list[float], dict[str, torch.Tensor]]
Batches = list[tuple[torch.Tensor, ...]]


def _stock_schedule(ddp: Any, batches: Batches, run: Any) -> None:
    """One micro-batch after the other, as megatron-core does it with its own loss factor."""

    def forward_step(given: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        return run(next(given)), lambda loss: (loss, None)

    with megatron_scope():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=ddp,
            num_microbatches=len(batches),
            seq_length=CASE.length,
            micro_batch_size=len(batches[0][0]),
        )


def _train(links: ContextLinks, parallel: ParallelConfig, stock: bool) -> Course:
    """Three outer steps: the whole batch's loss before each, and the parameters after."""
    learner, model = CASE.build(), CASE.model_config
    ddp = replicate(learner, model, parallel, bucket_size=BUCKET)
    config = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, clip_grad=0.1)
    optimizer = build_optimizer([ddp], config, total_steps=20)
    part = context_part(links, CASE.length // links.size, model.window_size)
    share = SEQUENCES // parallel_state.get_data_parallel_world_size()
    first = share * parallel_state.get_data_parallel_rank()
    losses = []
    for step in range(3):
        rows = micro_batch(CASE.length, step, SEQUENCES)
        own = [own_part(x, links)[first : first + share] for x in rows]
        batches = list(zip(*(x.split(1) for x in own), strict=True))
        total = torch.zeros((), dtype=torch.float64)

        def run(batch: Any, total: torch.Tensor = total) -> torch.Tensor:
            loss = ddp(*batch, None, part).loss
            total += loss.detach() / SEQUENCES
            return loss

        optimizer.zero_grad()
        wait_for_parameters(ddp)
        if stock:
            _stock_schedule(ddp, batches, run)
        else:
            context_forward_backward(
                ddp, links, len(batches), lambda i, all=batches, run=run: (run(all[i]), i)
            )
        dist.all_reduce(total)
        losses.append(total.item())
        optimizer.step(step)
    settle_parameters(ddp)
    return losses, {name: p.detach().clone() for name, p in learner.named_parameters()}


def _courses(context: int, kinds: list[tuple[ParallelConfig, bool]]) -> list[Course]:
    install_standins()
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **(alone if context == 1 else {}))
    parallel_state.initialize_model_parallel(context_parallel_size=context)
    try:
        links = context_links(parallel_state.get_context_parallel_group())
        assert links.size == context
        return [_train(links, *kind) for kind in kinds]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def test_three_steps_on_two_replicas_of_two_parts_equal_one_process() -> None:
    plain = ParallelConfig(data=2)
    overlapping = ParallelConfig(data=2, overlap_grad_reduce=True, overlap_param_gather=True)
    kinds = [(plain, False), (overlapping, False), (plain, True)]
    [one] = _courses(1, [(ParallelConfig(), True)])
    for kind, several in zip(kinds, launch(_courses, (2, kinds), 4), strict=True):
        torch.testing.assert_close(several[0], one[0], rtol=1e-10, atol=0, msg=str(kind))
        for name, value in one[1].items():
            bound = 1e-10 * value.abs().max().item()
            torch.testing.assert_close(several[1][name], value, rtol=0, atol=bound, msg=name)
