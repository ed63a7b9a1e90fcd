"""Context parallelism in up to six passes a part, in an order fixed beforehand by a simulation.

Where a rank holds two parts of a sequence, one from the front and one from the back, it always has
something to do for some micro-batch; what other ranks wait for comes first, and the gradients of
slow weights, which nobody waits for, last. Every rank runs the same simulation and takes from it
the order of its own passes, so nothing is negotiated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from ttt_kernels import WeightGradients, putting_off
from ttt_megatron.meta.learner import Learner, LearnerOutput
from ttt_megatron.meta.part import Part
from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.planning.schedules import PhaseSeconds, simulate
from ttt_megatron.tracing import span

Measured = TypeVar("Measured")
PartBatch = tuple[Tensor, Tensor, Tensor]
"""Tokens, targets and mask of one part of a micro-batch."""

# Shares of a step's FLOPs at 3B and 128K, the suffix's backward pass split. Another shape's would
# make another order, perhaps a better one, but never a wrong one. The prefix's is whole: splitting
# it too would gain nothing under the same limit on what is put off.
SHARES = PhaseSeconds(
    prefix_forward=0.125,
    prefix_backward=0.274,
    suffix_forward=0.160,
    suffix_backward=0.361,
    suffix_weights=0.079,
)
DEBTS = 1
"""Parts whose slow weights' gradients a rank puts off at a time. Each holds the factors of its
products in memory, and more of them gain little.
"""


_RECEIVING = ("suffix_forward", "suffix_backward")
"""Passes that receive the inner loop's state, or its cotangent."""


@dataclass(frozen=True)
class PartPass:
    """One pass, a method of `PartPasses`, over one part of one micro-batch."""

    kind: str
    micro_batch: int
    part: int


def zigzag_order(
    num_micro_batches: int,
    size: int,
    rank: int,
    seconds: PhaseSeconds = SHARES,
    debts: int | None = DEBTS,
) -> list[PartPass]:
    """The passes of a rank in the order it takes them; at most two whole sequences' parts live.

    A backward pass is split if its `weights` phase takes time; at most `debts` are then put off
    at once (None: no limit). In the simulation a pass starts no earlier than what it waits for,
    on whatever rank; so no two ranks wait for each other, however long passes take in truth.

    Raises ValueError if the suffix's recomputation has a phase of its own, which it cannot have.
    """
    if seconds.recompute:
        raise ValueError("the suffix's recomputation is no pass of its own: its seconds must be 0")
    timeline = simulate("zigzag", [seconds], size, num_micro_batches, debts=debts)
    # Phases of no length, which this division does not have, are in the simulation all the same.
    own = [task for task in timeline.tasks if task.worker == rank and task.seconds > 0]
    own.sort(key=lambda task: task.start)
    return [PartPass(task.phase, task.micro_batch, task.shard) for task in own]


@dataclass(kw_only=True)
class PartPasses(Generic[Measured]):
    """The passes over a rank's parts.

    `batch(i, p)` is part p of micro-batch i, `scale` multiplies its loss; `measured` collects
    what `measure` makes of every output and its part, by (micro-batch, part).

    The backward pass of a half (prefix or suffix) is split if the order has a pass for the half's
    slow weights. Their gradients are then added to `main_grad` or `grad` by that pass, past any
    hook: whoever reduces gradients does so after all passes.
    """

    learner: Learner
    parts: dict[int, Part]
    batch: Callable[[int, int], PartBatch]
    inner_lr: float | None
    scale: float
    measure: Callable[[LearnerOutput, Part], Measured]
    measured: dict[tuple[int, int], Measured] = field(default_factory=dict)
    _entered: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _cut: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _loss: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _kinds: set[str] = field(default_factory=set)
    _owed: dict[tuple[str, int, int], WeightGradients] = field(default_factory=dict)

    def run(self, order: list[PartPass], links: ContextLinks) -> None:
        """All passes in this order; on return everything sent has arrived.

        Raises RuntimeError if the order leaves gradients that were put off unformed.
        """
        self._kinds = {one.kind for one in order}
        steps = self.learner.takes_steps()
        receiving = iter([one for one in order if steps and one.kind in _RECEIVING])
        self._expect(next(receiving, None))
        for one in order:
            if steps and one.kind in _RECEIVING:
                self._expect(next(receiving, None))
            getattr(self, one.kind)(one.micro_batch, one.part)
        links.settle()
        if self._owed:
            raise RuntimeError(
                "slow weights' gradients were put off and never formed: (half, micro-batch, part) "
                f"{sorted(self._owed)} have no pass for them in the order"
            )

    def _expect(self, one: PartPass | None) -> None:
        """What the pass receives may come in from now on."""
        if one is None:
            return
        part = self.parts[one.part]
        rows = len(self.batch(one.micro_batch, one.part)[0])
        if one.kind == "suffix_forward":
            part.expect_state(rows)
        else:
            part.expect_cotangent(rows)

    @contextmanager
    def _put_off(self, half: str, micro_batch: int, part: int) -> Iterator[None]:
        """Within: what the half's operations owe is kept for the pass that forms it."""
        if f"{half}_weights" not in self._kinds:
            yield
            return
        owed = self._owed.setdefault((half, micro_batch, part), WeightGradients())
        with putting_off(owed):
            yield

    def prefix_forward(self, micro_batch: int, part: int) -> None:
        """Up to where the suffix begins."""
        tokens, _, _ = self.batch(micro_batch, part)
        with self._put_off("prefix", micro_batch, part):
            self._entered[micro_batch, part] = self.learner.run_prefix(tokens, self.parts[part])

    def suffix_forward(self, micro_batch: int, part: int) -> None:
        """The loss, from a cut in the graph on."""
        key = micro_batch, part
        _, targets, mask = self.batch(micro_batch, part)
        self._cut[key] = self._entered[key].detach().requires_grad_()
        with self._put_off("suffix", micro_batch, part):
            output = self.learner.run_suffix(
                self._cut[key], targets, mask, self.inner_lr, self.parts[part]
            )
        self._loss[key] = output.loss
        self.measured[key] = self.measure(output, self.parts[part])

    def suffix_backward(self, micro_batch: int, part: int) -> None:
        """Back to the cut."""
        (self._loss.pop((micro_batch, part)) * self.scale).backward()

    def prefix_backward(self, micro_batch: int, part: int) -> None:
        """From the cut on."""
        key = micro_batch, part
        # Blocks whose activations are recomputed run forwards once more here.
        with self._put_off("prefix", micro_batch, part):
            self._entered.pop(key).backward(self._cut.pop(key).grad)

    def suffix_weights(self, micro_batch: int, part: int) -> None:
        """The slow weights' gradients that the suffix's backward pass left out."""
        with span("suffix weights"):
            self._owed.pop(("suffix", micro_batch, part)).form()

    def prefix_weights(self, micro_batch: int, part: int) -> None:
        """The same for the prefix."""
        with span("prefix weights"):
            self._owed.pop(("prefix", micro_batch, part)).form()
