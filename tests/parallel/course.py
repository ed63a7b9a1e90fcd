"""A short float64 training whose every result is put together from all ranks, for comparison."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttt_megatron.config import InnerConfig, ModelConfig, OptimizerConfig, ParallelConfig
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import layer_slots, replicate, settle_parameters
from ttt_megatron.parallel.shards import cut_of
from ttt_megatron.parallel.traffic import Traffic, counted_traffic
from ttt_megatron.training.optimizer import build_optimizer
from ttt_megatron.training.step import forward_backward, reduce_measurements

MODEL = {
    "vocab_size": 20,
    "num_layers": 4,
    "num_suffix_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 12,
    "window_size": 7,
    "init_std": 0.3,
}
# Large steps, some of them clipped: small ones would hide second-order errors.
INNER = {"chunk_size": 4, "lr": 0.7, "clip": 2.0}
LENGTH, BATCH, STEPS = 12, 2, 3


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is trained, and under which layout."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: dict = field(default_factory=dict)
    inner: dict = field(default_factory=dict)
    micro: int = 2
    recompute_prefix: bool = False
    length: int = LENGTH


Course = dict[str, Tensor]
"""Results by name. `first/…` are Adam's moments after the first step: the clipped gradient,
scaled, and its square."""


def batch(step: int, rank: int = 0, size: int = 1, length: int = LENGTH) -> Batch:
    """A data-parallel rank's share of a step's batch, with an uneven mask."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, 19, (BATCH, length + 1), generator=generator)
    mask = torch.rand(BATCH, length, generator=generator) > 0.2
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    places = torch.zeros(BATCH, 2, dtype=torch.int64)
    whole = (rows[:, :-1], rows[:, 1:], mask, torch.arange(BATCH), places)
    return Batch(*[tensor[share] for tensor in whole])


def build(kind: Kind) -> Learner:
    """The rank's part of the learner."""
    model = ModelConfig(**(MODEL | kind.model))
    return Learner(
        model,
        InnerConfig(**(INNER | kind.inner)),
        dtype=torch.float64,
        recompute_prefix=kind.recompute_prefix,
        seed=5,
        slots=layer_slots(model, kind.parallel),
    )


def train(groups: Groups, kind: Kind) -> Course:
    """Evaluates, then takes three outer steps; everything whole, on every rank. Collective."""
    learner, course = build(kind), {}
    own = batch(0, groups.data_rank, groups.data_size, kind.length)
    if groups.data_size == groups.context_size == 1:
        with torch.no_grad():
            read = learner(own.tokens, own.targets, own.mask, final_step=True)
        course |= {"nll": read.token_nll, "chunk losses": read.chunk_losses}
        course |= _fast_weights(groups, learner, read.fast_weights or [])
    ddp = replicate(learner, learner.model.config, kind.parallel)
    config = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, clip_grad=0.1)
    optimizer = build_optimizer([ddp], config, total_steps=20)
    for step in range(STEPS):
        optimizer.zero_grad()
        own = batch(step, groups.data_rank, groups.data_size, kind.length)
        measured = forward_backward(ddp, own.split(kind.micro), learner.inner.lr, groups.links)
        measurements, _ = reduce_measurements(measured, False, groups)
        # The clipped share is in single precision.
        figures = [v for n, v in vars(measurements).items() if v is not None and n[:4] != "clip"]
        figures.append(optimizer.step(step).grad_norm)
        course[f"figures {step}"] = torch.tensor(figures, dtype=torch.float64)
        if step == 0:
            course |= _moments(groups, optimizer.gathered_moments(), "first")
    settle_parameters(ddp)
    course |= _moments(groups, optimizer.gathered_moments(), "last")
    parts = {name: p.detach().clone() for name, p in learner.named_parameters()}
    return course | _whole(groups, parts, "parameter", lambda name: name)


def traffic(kind: Kind) -> tuple[Traffic, Traffic]:
    """What a forward and a backward pass over one micro-batch send. Collective."""
    learner, whole = build(kind), batch(0)
    with counted_traffic() as forward:
        loss = learner(whole.tokens, whole.targets, whole.mask).loss
    with counted_traffic() as backward:
        loss.backward()
    return forward, backward


def _moments(groups: Groups, moments: dict, when: str) -> Course:
    """Each data × context rank has some of the names."""
    flat = {f"{m}/{n}": tensor for n, pair in moments.items() for m, tensor in pair.items()}
    return _whole(groups, flat, when, lambda name: name.split("/")[1])


def _fast_weights(groups: Groups, learner: Learner, fast: list[Tensor]) -> Course:
    """The sequences' fast weights, each sequence's under a name of its own."""
    parts = {
        f"{number}/{name}": one
        for name, weights in zip(learner.fast_parameter_names, fast, strict=bool(fast))
        for number, one in enumerate(weights)
    }
    return _whole(groups, parts, "fast", lambda name: name.split("/")[1])


def _whole(
    groups: Groups, parts: dict[str, Tensor], title: str, parameter: Callable[[str], str]
) -> Course:
    """Joins the tensor-parallel ranks' parts; what all have must be the same on all."""
    by_rank: list[dict[str, Tensor]] = [{} for _ in range(groups.tensor_size)]
    for tensor_rank, found in groups.gather_objects((groups.tensor_rank, parts)):
        by_rank[tensor_rank] |= found
    whole = {}
    for name, first in by_rank[0].items():
        pieces, cut = [ranks[name] for ranks in by_rank], cut_of(parameter(name))
        if cut is None:
            assert all(torch.equal(piece, first) for piece in pieces), name
        whole[f"{title}/{name}"] = first if cut is None else cut.join(pieces)
    return whole


def worst(course: Course, expected: Course) -> tuple[float, str]:
    """The largest difference of any result relative to its largest entry, and its name."""
    assert course.keys() == expected.keys() & course.keys()
    errors = [
        (float((course[n] - e).abs().max() / e.abs().max().clamp_min(1e-12)), n)
        for n, e in expected.items()
        if n in course
    ]
    return max(errors)
