"""Two processes must compute what one does, with whatever communication overlaps."""

from dataclasses import replace

import pytest
import torch
from ranks import launch

from ttt_megatron.config import InnerConfig, ModelConfig, OptimizerConfig, ParallelConfig
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups, process_groups
from ttt_megatron.parallel.replica import replicate, settle_parameters
from ttt_megatron.training.optimizer import build_optimizer
from ttt_megatron.training.passes import forward_backward
from ttt_megatron.training.step import reduce_measurements

MODEL = ModelConfig(
    vocab_size=37,
    num_layers=3,
    num_suffix_layers=2,
    hidden_size=16,
    num_heads=2,
    ffn_hidden_size=24,
    window_size=12,
)
INNER = InnerConfig(chunk_size=4, clip=0.05)
# Small enough for several buckets, so that padding between them and their order matter.
BUCKET = 700

Course = tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def _batch(step: int, rank: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, 37, (4, 17), generator=generator)
    rows = rows[rank * 4 // size : (rank + 1) * 4 // size]
    return Batch.from_rows(list(rows.numpy()), 1, range(len(rows)), [(0, 0)] * len(rows))


def _train(groups: Groups, parallel: ParallelConfig, micro: int) -> Course:
    """Three steps in float64: losses, gradient norms, moments and parameters."""
    config = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, clip_grad=0.1)
    learner = Learner(MODEL, INNER, dtype=torch.float64, seed=5)
    [ddp] = replicate([learner], MODEL, parallel, bucket_size=BUCKET)
    assert (len(ddp.bucket_groups) > 1) == parallel.overlap_grad_reduce
    optimizer = build_optimizer([ddp], config, total_steps=20)
    losses, norms = [], []
    for step in range(3):
        batch = _batch(step, groups.data_rank, groups.data_size)
        optimizer.zero_grad()
        measured = forward_backward([ddp], batch.split(micro), 0.7, groups)
        losses.append(reduce_measurements(measured, [], groups)[0].loss)
        norms.append(optimizer.step(step).grad_norm)
    settle_parameters(ddp)
    whole = {}
    for moments in groups.gather_objects(optimizer.gathered_moments()):
        whole |= {f"{n}/{m}": tensor for n, pair in moments.items() for m, tensor in pair.items()}
    return losses, norms, whole, {n: p.detach().clone() for n, p in learner.named_parameters()}


def _several(kinds: list[tuple[ParallelConfig, int]]) -> list[Course]:
    with process_groups("cpu") as groups:
        return [_train(groups, *kind) for kind in kinds]


def test_two_processes_compute_what_one_does() -> None:
    base = ParallelConfig(data=2)
    reduce = replace(base, overlap_grad_reduce=True)
    gather = replace(reduce, overlap_param_gather=True)
    kinds = [(base, 1), (reduce, 2), (gather, 1), (gather, 2)]
    [one] = _several([(ParallelConfig(), 2)])
    for (parallel, _), two in zip(kinds, launch(_several, (kinds,), 2), strict=True):
        assert two[0] == pytest.approx(one[0], rel=1e-12), parallel
        assert two[1] == pytest.approx(one[1], rel=1e-12), parallel
        for mine, other in ((one[2], two[2]), (one[3], two[3])):
            assert mine.keys() == other.keys()
            assert mine
            for name, value in mine.items():
                bound = 1e-11 * value.abs().max().item()
                torch.testing.assert_close(other[name], value, rtol=0, atol=bound, msg=name)


def test_accumulated_gradients_are_the_batch_mean() -> None:
    one, four = _several([(ParallelConfig(), 4), (ParallelConfig(), 1)])
    assert four[0] == pytest.approx(one[0], rel=1e-12)
    assert four[1] == pytest.approx(one[1], rel=1e-12)
