"""A short float64 training whose every result is put together from all ranks, for comparison."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ttt_megatron.config import (
    DataConfig,
    InnerConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups, layout, processes
from ttt_megatron.parallel.pipeline import own_stages, read_in_stages
from ttt_megatron.parallel.replica import layer_slots, replicate, settle_parameters
from ttt_megatron.parallel.shards import cut_of
from ttt_megatron.parallel.traffic import Traffic, counted_traffic
from ttt_megatron.training.optimizer import OuterOptimizer, build_optimizer
from ttt_megatron.training.optimizer_state import Moments
from ttt_megatron.training.parts import own_parts
from ttt_megatron.training.passes import forward_backward
from ttt_megatron.training.step import reduce_measurements
from ttt_megatron.training.weights import build_learner

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

MODEL: dict[str, Any] = {
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
INNER: dict[str, Any] = {"chunk_size": 4, "lr": 0.7, "clip": 2.0}
OPTIMIZER = OptimizerConfig(lr=2e-3, warmup_fraction=0.0, clip_grad=0.1)
LENGTH, BATCH, STEPS = 12, 2, 3


class Case(Protocol):
    """What is trained, and under which layout; picklable."""

    @property
    def parallel(self) -> ParallelConfig:
        """The layout."""

    @property
    def micro(self) -> int:
        """Sequences in a micro-batch."""

    @property
    def steps(self) -> int:
        """Outer steps that are taken."""

    @property
    def config(self) -> RunConfig:
        """The run."""

    def whole_batch(self, step: int) -> Batch:
        """A step's batch, of all replicas."""

    def fill(self, learner: Learner) -> None:
        """Gives a rank's part of the model other weights than the initial ones."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The tiny model, with any of its settings changed."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)
    micro: int = 2
    recompute_prefix: bool = False
    length: int = LENGTH
    sequences: int = BATCH
    steps: int = STEPS

    @property
    def config(self) -> RunConfig:
        """The run."""
        return RunConfig(
            model=ModelConfig(**(MODEL | self.model)),
            inner=InnerConfig(**(INNER | self.inner)),
            data=DataConfig(sequence_length=self.length),
            optimizer=OPTIMIZER,
            parallel=self.parallel,
            training=TrainingConfig(
                precision="fp64",
                recompute_prefix=self.recompute_prefix,
                seed=5,
                steps=20,
                global_batch_size=self.sequences,
                micro_batch_size=self.micro,
            ),
        )

    def whole_batch(self, step: int) -> Batch:
        """Random tokens under an uneven mask."""
        generator = torch.Generator().manual_seed(step)
        count, length = self.sequences, self.length
        rows = torch.randint(0, 19, (count, length + 1), generator=generator)
        mask = torch.rand(count, length, generator=generator) > 0.2
        places = torch.zeros(count, 2, dtype=torch.int64)
        return Batch(rows[:, :-1], rows[:, 1:], mask, torch.arange(count), places)

    def fill(self, learner: Learner) -> None:
        """Leaves the initial weights."""


Course = dict[str, Tensor]
"""Results by name: those of an evaluation, of every step, outer gradients of the first step,
Adam's moments and the parameters after the last. `train` says the names."""


def batch(case: Case, step: int, rank: int = 0, size: int = 1) -> Batch:
    """A data-parallel rank's share of a step's batch."""
    whole = case.whole_batch(step)
    return whole[rank * len(whole) // size : (rank + 1) * len(whole) // size]


def build(case: Case, groups: Groups) -> list[Learner]:
    """The rank's parts of the learner."""
    config = case.config
    slots = layer_slots(config.model, case.parallel)
    learners = [build_learner(config, slots, stage) for stage in own_stages(config, groups)]
    for learner in learners:
        case.fill(learner)
        learner.to(groups.device)
    return learners


def train(groups: Groups, case: Case) -> Course:
    """Evaluates, then takes outer steps; everything whole, on every rank, on the CPU. Collective.

    Names are `nll`, `chunk losses`, `fast/<row>/<parameter>`, `loss/<step>`,
    `logged/<step>/<figure>`, `gradient/<parameter>` (the first step's, as the norm clips them
    undone), `moment/<moment>/<parameter>` and `parameter/<parameter>`.
    """
    config, learners = case.config, build(case, groups)
    course = _read(groups, learners, case)
    chunks = replicate(learners, config.model, case.parallel)
    optimizer = build_optimizer(chunks, config.optimizer, total_steps=config.training.steps)
    for step in range(case.steps):
        figures = outer_step(groups, case, chunks, optimizer, step)
        course |= figures
        if step == 0:
            norm = float(figures["logged/0/grad_norm"])
            course |= _gradients(groups, optimizer.gathered_moments(), config.optimizer, norm)
    for chunk in chunks:
        settle_parameters(chunk)
    course |= _moments(groups, optimizer.gathered_moments())
    parts = {name: p.detach().clone() for one in learners for name, p in one.named_parameters()}
    return course | _whole(groups, parts, "parameter", lambda name: name)


def outer_step(
    groups: Groups,
    case: Case,
    chunks: "list[DistributedDataParallel]",
    optimizer: OuterOptimizer,
    step: int,
) -> Course:
    """What the trainer does in a step, and logs. Collective."""
    optimizer.zero_grad()
    own = batch(case, step, groups.data_rank, groups.data_size).to(groups.device)
    measured = forward_backward(chunks, own.split(case.micro), case.config.inner.lr, groups)
    measurements, _ = reduce_measurements(measured, [False, False], groups)
    figures = vars(measurements) | {"grad_norm": optimizer.step(step).grad_norm}
    return {
        f"loss/{step}" if name == "loss" else f"logged/{step}/{name}": torch.tensor(
            value, dtype=torch.float64
        )
        for name, value in figures.items()
        # The clipped share is in single precision.
        if value is not None and name != "clipped_share"
    }


def courses(cases: Sequence[Case], device: str = "cpu") -> list[tuple[Course, float]]:
    """The cases one after the other, with the seconds each took. Collective over all processes."""
    with processes(device) as own_device:
        return under_layouts(own_device, cases)


def under_layouts(device: torch.device, cases: Sequence[Case]) -> list[tuple[Course, float]]:
    """The same in processes that have been started."""
    found = []
    for case in cases:
        # Links between parts serve one model: each case has its own.
        with layout(device, case.parallel) as groups:
            start = time.perf_counter()
            course = train(groups, case)
            found.append((course, time.perf_counter() - start))
    return found


def traffic(kind: Kind) -> tuple[Traffic, Traffic]:
    """What a forward and a backward pass over one micro-batch send. Collective.

    Of layouts whose ranks hold whole sequences and all blocks.
    """
    config, whole = kind.config, batch(kind, 0)
    learner = build_learner(config, layer_slots(config.model, kind.parallel))
    with counted_traffic() as forward:
        loss = learner(whole.tokens, whole.targets, whole.mask).loss
    with counted_traffic() as backward:
        loss.backward()
    return forward, backward


def _read(groups: Groups, learners: list[Learner], case: Case) -> Course:
    """Losses and fast weights of the first batch, a step after the last chunk included."""
    own = batch(case, 0, groups.data_rank, groups.data_size).to(groups.device)
    found: list[tuple[tuple[int, int], Course]] = []
    fast: dict[str, Tensor] = {}
    for number, one in enumerate(own_parts(own, groups.links, learners[-1])):
        tokens = one.tokens, one.targets, one.mask
        lr = case.config.inner.lr
        output = read_in_stages(learners, groups.stages, tokens, lr, one.part, final_step=True)
        if output is None:
            continue
        place = groups.data_rank, groups.links.own_parts[number] if groups.links else 0
        losses = {"nll": output.token_nll.cpu(), "chunk losses": output.chunk_losses.cpu()}
        found.append((place, losses))
        if one.part.is_last:
            names = learners[-1].fast_parameter_names
            weights = output.fast_weights or []
            fast = {
                f"{int(own.rows[row])}/{name}": weight[row]
                for name, weight in zip(names, weights, strict=bool(weights))
                for row in range(len(own))
            }
    groups.settle()
    by_place = dict(pair for pairs in groups.gather_objects(found) for pair in pairs)
    places = sorted(by_place)
    last = max(part for _, part in places)
    whole = {
        name: torch.cat(
            [
                torch.cat([by_place[data, part][name] for part in range(last + 1)], dim=1)
                for data in sorted({data for data, _ in places})
            ]
        )
        for name in ("nll", "chunk losses")
    }
    return whole | _whole(groups, fast, "fast", lambda name: name.split("/")[1])


def _gradients(groups: Groups, moments: Moments, optimizer: OptimizerConfig, norm: float) -> Course:
    """The outer gradients, from Adam's first moments after one step with gradients of this norm."""
    scale = min(1.0, optimizer.clip_grad / norm) * (1 - optimizer.beta1)
    flat = {name: pair["exp_avg"] / scale for name, pair in moments.items()}
    return _whole(groups, flat, "gradient", lambda name: name)


def _moments(groups: Groups, moments: Moments) -> Course:
    """Each data × context rank has some of the names."""
    flat = {f"{m}/{n}": tensor for n, pair in moments.items() for m, tensor in pair.items()}
    return _whole(groups, flat, "moment", lambda name: name.split("/")[1])


def _whole(
    groups: Groups, parts: dict[str, Tensor], title: str, parameter: Callable[[str], str]
) -> Course:
    """Joins the tensor-parallel ranks' parts; what several ranks have must be the same on all."""
    by_rank: list[dict[str, Tensor]] = [{} for _ in range(groups.tensor_size)]
    own = {name: part.cpu() for name, part in parts.items()}
    for tensor_rank, found in groups.gather_objects((groups.tensor_rank, own)):
        known = by_rank[tensor_rank]
        for name in found.keys() & known.keys():
            assert torch.equal(found[name], known[name]), f"{title}/{name} differs between ranks"
        known |= found
    whole = {}
    for name, first in by_rank[0].items():
        pieces, cut = [ranks[name] for ranks in by_rank], cut_of(parameter(name))
        if cut is None:
            assert all(torch.equal(piece, first) for piece in pieces), name
        whole[f"{title}/{name}"] = first if cut is None else cut.join(pieces)
    return whole


def errors(course: Course, expected: Course) -> dict[str, float]:
    """The largest difference of every result relative to its largest entry.

    Raises AssertionError where one has results that the other lacks.
    """
    assert course.keys() == expected.keys(), sorted(course.keys() ^ expected.keys())
    return {
        name: float((course[name] - e).abs().max() / e.abs().max().clamp_min(1e-12))
        for name, e in expected.items()
    }


def worst(course: Course, expected: Course) -> tuple[float, str]:
    """The largest of `errors`, and its name."""
    return max((error, name) for name, error in errors(course, expected).items())
