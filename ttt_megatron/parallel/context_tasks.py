"""Context parallelism in four passes a part, in an order fixed beforehand by a simulation.

Where a rank holds two parts of a sequence, one from the front and one from the back, it always has
something to do for some micro-batch; what other ranks wait for comes first. Every rank runs the
same simulation and takes from it the order of its own passes, so nothing is negotiated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from ttt_megatron.meta.learner import Learner, LearnerOutput
from ttt_megatron.meta.part import Part
from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.planning.schedules import PhaseSeconds, simulate

Measured = TypeVar("Measured")
PartBatch = tuple[Tensor, Tensor, Tensor]
"""Tokens, targets and mask of one part of a micro-batch."""

# Shares of a step's FLOPs at 3B and 128K. Another shape's would make another order, perhaps a
# better one, but never a wrong one.
SHARES = PhaseSeconds(
    prefix_forward=0.125, prefix_backward=0.274, suffix_forward=0.160, suffix_backward=0.440
)


@dataclass(frozen=True)
class PartPass:
    """One pass, a method of `PartPasses`, over one part of one micro-batch."""

    kind: str
    micro_batch: int
    part: int


def zigzag_order(
    num_micro_batches: int, size: int, rank: int, seconds: PhaseSeconds = SHARES
) -> list[PartPass]:
    """The passes of a rank in the order it takes them; at most two whole sequences' parts live.

    In the simulation a pass starts no earlier than what it waits for, on whatever rank; so no
    two ranks wait for each other, however long passes take in truth.
    """
    timeline = simulate("zigzag", [seconds], size, num_micro_batches)
    # Phases of no length, which this division does not have, are in the simulation all the same.
    own = [task for task in timeline.tasks if task.worker == rank and task.seconds > 0]
    own.sort(key=lambda task: task.start)
    return [PartPass(task.phase, task.micro_batch, task.shard) for task in own]


@dataclass(kw_only=True)
class PartPasses(Generic[Measured]):
    """The four passes over a rank's parts.

    `batch(i, p)` is part p of micro-batch i, `scale` multiplies its loss; `measured` collects
    what `measure` makes of every output, by (micro-batch, part).
    """

    learner: Learner
    parts: dict[int, Part]
    batch: Callable[[int, int], PartBatch]
    inner_lr: float | None
    scale: float
    measure: Callable[[LearnerOutput], Measured]
    measured: dict[tuple[int, int], Measured] = field(default_factory=dict)
    _entered: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _cut: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _loss: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def run(self, order: list[PartPass], links: ContextLinks) -> None:
        """All passes in this order; on return everything sent has arrived."""
        for one in order:
            getattr(self, one.kind)(one.micro_batch, one.part)
        links.settle()

    def prefix_forward(self, micro_batch: int, part: int) -> None:
        """Up to where the suffix begins."""
        tokens, _, _ = self.batch(micro_batch, part)
        self._entered[micro_batch, part] = self.learner.run_prefix(tokens, self.parts[part])

    def suffix_forward(self, micro_batch: int, part: int) -> None:
        """The loss, from a cut in the graph on."""
        key = micro_batch, part
        _, targets, mask = self.batch(micro_batch, part)
        self._cut[key] = self._entered[key].detach().requires_grad_()
        output = self.learner.run_suffix(
            self._cut[key], targets, mask, self.inner_lr, self.parts[part]
        )
        self._loss[key] = output.loss
        self.measured[key] = self.measure(output)

    def suffix_backward(self, micro_batch: int, part: int) -> None:
        """Back to the cut."""
        (self._loss.pop((micro_batch, part)) * self.scale).backward()

    def prefix_backward(self, micro_batch: int, part: int) -> None:
        """From the cut on."""
        key = micro_batch, part
        self._entered.pop(key).backward(self._cut.pop(key).grad)
