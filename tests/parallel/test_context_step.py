"""Training steps with context parallelism inside mcore's DDP: what one process computes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from context_case import SPLITS, Case, micro_batch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from ranks import launch

from ttt_megatron.config import OptimizerConfig, ParallelConfig
from ttt_megatron.parallel.context import context_parts, own_tokens
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.context_step import context_forward_backward, zigzag_forward_backward
from ttt_megatron.parallel.replica import replicate, settle_parameters, wait_for_parameters
from ttt_megatron.parallel.standins import install_standins, megatron_scope
from ttt_megatron.training.optimizer import build_optimizer

CASE = Case(inner={"clip": 0.5})
SEQUENCES = 6
# Several buckets, so that reductions start while backward passes still run.
BUCKET = 700

Course = tuple[list[float], dict[str, torch.Tensor]]
Batches = list[tuple[torch.Tensor, ...]]
Losses = list[torch.Tensor]


def _stock(ddp: Any, links: ContextLinks, parts: list, batches: dict[int, Batches]) -> Losses:
    """One micro-batch after the other, as megatron-core does it with its own loss factor."""
    [own] = batches.values()

    def forward_step(given: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        loss = model(*next(given), None, parts[0]).loss
        measured = loss.detach().clone()
        return loss, lambda loss: (loss, measured)

    with megatron_scope():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(own),
            model=ddp,
            num_microbatches=len(own),
            seq_length=CASE.length,
            micro_batch_size=1,
        )


def _plain(ddp: Any, links: ContextLinks, parts: list, batches: dict[int, Batches]) -> Losses:
    [own] = batches.values()

    def forward(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss = ddp(*own[index], None, parts[0]).loss
        return loss, loss.detach()

    sizes = [len(tokens) for tokens, _, _ in own]
    return context_forward_backward(ddp, links, parts[0], sizes, forward)


def _zigzag(
    ddp: Any, links: ContextLinks, parts: list, batches: dict[int, Batches], split: str
) -> Losses:
    count = len(next(iter(batches.values())))
    measured = zigzag_forward_backward(
        ddp,
        links,
        parts,
        count,
        lambda index, part: batches[part][index],
        None,
        lambda output, part: output.loss.detach(),
        SPLITS[split],
    )
    return list(measured.values())


SCHEDULES = {"stock": _stock, "plain": _plain}
SCHEDULES |= {f"zigzag {split}": partial(_zigzag, split=split) for split in SPLITS}


def _train(links: ContextLinks, parallel: ParallelConfig, schedule: str) -> Course:
    """Three outer steps: the whole batch's loss before each, and the parameters after."""
    learner, model = CASE.build(), CASE.model_config
    [ddp] = replicate([learner], model, parallel, bucket_size=BUCKET)
    config = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, clip_grad=0.1)
    optimizer = build_optimizer([ddp], config, total_steps=20)
    parts = context_parts(links, CASE.length // links.num_parts, model.window_size)
    share = SEQUENCES // parallel_state.get_data_parallel_world_size()
    first = share * parallel_state.get_data_parallel_rank()
    losses = []
    for step in range(3):
        rows = [x[first : first + share] for x in micro_batch(CASE.length, step, SEQUENCES)]
        by_part = zip(*(own_tokens(x, links) for x in rows), strict=True)
        batches = {
            part: list(zip(*(x.split(1) for x in own), strict=True))
            for part, own in zip(links.own_parts, by_part, strict=True)
        }
        optimizer.zero_grad()
        wait_for_parameters(ddp)
        loss = torch.stack(SCHEDULES[schedule](ddp, links, parts, batches)).sum() / SEQUENCES
        dist.all_reduce(loss)
        losses.append(loss.item())
        optimizer.step(step)
    settle_parameters(ddp)
    return losses, {name: p.detach().clone() for name, p in learner.named_parameters()}


def _courses(context: int, kinds: list[tuple[ParallelConfig, str]]) -> list[Course]:
    install_standins()
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **(alone if context == 1 else {}))
    parallel_state.initialize_model_parallel(context_parallel_size=context)
    try:
        group = parallel_state.get_context_parallel_group()
        links = {zigzag: context_links(group, zigzag=zigzag) for zigzag in (False, True)}
        assert links[False].size == context
        return [_train(links[kind[1].startswith("zigzag")], *kind) for kind in kinds]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.mark.slow
def test_three_steps_on_two_replicas_of_two_parts_equal_one_process() -> None:
    plain = ParallelConfig(data=2)
    overlapping = ParallelConfig(data=2, overlap_grad_reduce=True, overlap_param_gather=True)
    kinds = [
        (overlapping, "plain"),
        (plain, "stock"),
        (overlapping, "zigzag none"),
        (plain, "zigzag suffix"),
        (overlapping, "zigzag suffix"),
        (overlapping, "zigzag both"),
    ]
    [one] = _courses(1, [(ParallelConfig(), "stock")])
    for kind, several in zip(kinds, launch(_courses, (2, kinds), 4), strict=True):
        torch.testing.assert_close(several[0], one[0], rtol=1e-10, atol=0, msg=str(kind))
        for name, value in one[1].items():
            bound = 1e-10 * value.abs().max().item()
            torch.testing.assert_close(several[1][name], value, rtol=0, atol=bound, msg=name)
