"""Schedules of context and pipeline parallelism, simulated."""

from itertools import pairwise

import pytest

from ttt_megatron.planning.interleaved import simulate_interleaved
from ttt_megatron.planning.schedules import PhaseSeconds, Transfers, simulate
from ttt_megatron.planning.simulator import DeadlockError, Simulation, Task
from ttt_megatron.planning.stages import cut_prefix

# Shares of a step's FLOPs of the 3B shape at 128K. Of the suffix's backward pass 15.5% is
# recomputation and 18% slow weights' gradients.
SHARES = PhaseSeconds(
    prefix_forward=0.125,
    prefix_backward=0.196,
    prefix_weights=0.078,
    suffix_forward=0.160,
    recompute=0.068,
    suffix_backward=0.293,
    suffix_weights=0.079,
)
# Micro-batches over ranks: (GPipe at 8 ranks, 1F1B at 8, zigzag at 8, zigzag at 16).
BUBBLES = {
    0.25: (0.68, 0.67, 0.56, 0.57),
    0.5: (0.51, 0.49, 0.28, 0.29),
    1: (0.34, 0.30, 0.05, 0.06),
    2: (0.21, 0.16, 0.0, 0.0),
}


@pytest.mark.parametrize(("rounds", "known"), BUBBLES.items())
def test_known_bubbles(rounds, known):
    cases = (("gpipe", 8, 0.02), ("1f1b", 8, 0.02), ("zigzag", 8, 0.03), ("zigzag", 16, 0.03))
    for (schedule, ranks, margin), bubble in zip(cases, known, strict=True):
        found = simulate(schedule, [SHARES], ranks, int(ranks * rounds), halo=False)
        assert found.bubble == pytest.approx(bubble, abs=margin), schedule


def well_formed(timeline):
    """No worker runs two tasks at once; nothing starts before what it waits for."""
    for worker in range(timeline.workers):
        own = sorted((t for t in timeline.tasks if t.worker == worker), key=lambda t: t.start)
        for before, after in pairwise(own):
            assert before.end <= after.start + 1e-12
    for task in timeline.tasks:
        for other, delay in task.after:
            assert task.start >= timeline.tasks[other].end + delay - 1e-12
        for other in task.together:
            assert task.start >= timeline.tasks[other].start


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zigzag"])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_every_schedule_keeps_its_order(schedule, micro_batches):
    hops = Transfers(relay_forward=0.01, relay_backward=0.02)
    timeline = simulate(schedule, [SHARES], 4, micro_batches, hops)
    well_formed(timeline)
    assert timeline.work == pytest.approx(SHARES.total * micro_batches)
    held = 2 if schedule == "zigzag" else 1
    assert max(timeline.peak_live) <= held * micro_batches
    # One sequence's suffix is sequential: a step lasts at least as long as the chain.
    chain = SHARES.suffix_forward + SHARES.suffix_backward
    assert timeline.seconds >= chain


def test_waiting_falls_with_micro_batches_and_priority():
    for schedule in ("gpipe", "1f1b", "zigzag"):
        bubbles = [simulate(schedule, [SHARES], 4, m).bubble for m in (1, 2, 4, 8)]
        assert bubbles == sorted(bubbles, reverse=True), schedule
    plain, zigzag = (simulate(s, [SHARES], 4, 4).bubble for s in ("1f1b", "zigzag"))
    assert zigzag < plain / 2


def test_fewer_places_hold_less_and_wait_more():
    free = simulate("zigzag", [SHARES], 4, 16)
    tight = simulate("zigzag", [SHARES], 4, 16, places=4)
    assert max(tight.peak_live) == 4 < max(free.peak_live) <= 16
    assert tight.seconds > free.seconds


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_least_places_block_nothing(ranks):
    hops = Transfers(relay_forward=0.01, relay_backward=0.02)
    for places in (2, 3, 5):
        for debts in (1, 2, None):
            timeline = simulate("zigzag", [SHARES], ranks, 6, hops, places, debts=debts)
            well_formed(timeline)
            assert max(timeline.peak_live) <= places
            assert debts is None or max(timeline.peak_debts) <= debts
    for places in (1, 2):
        well_formed(simulate("1f1b", [SHARES], ranks, 6, hops, places))


def test_transfers_delay_the_chain():
    hops = Transfers(relay_forward=1.0, relay_backward=2.0)
    slow, fast = (simulate("gpipe", [SHARES], 4, 1, t) for t in (hops, None))
    assert slow.seconds == pytest.approx(fast.seconds + 3 * 3.0)


def test_pipeline_of_equal_stages_waits_as_long_as_known():
    # (P − 1)/(M + P − 1), for both orders.
    stages = [PhaseSeconds(prefix_forward=1.0, prefix_backward=2.0)] * 3
    last = PhaseSeconds(suffix_forward=1.0, suffix_backward=2.0)
    for schedule in ("gpipe", "1f1b"):
        timeline = simulate(schedule, [*stages, last], 1, 8)
        well_formed(timeline)
        assert timeline.bubble == pytest.approx(3 / 11)
    assert simulate("1f1b", [*stages, last], 1, 8).peak_live == [4, 3, 2, 1]
    assert simulate("gpipe", [*stages, last], 1, 8).peak_live == [8, 8, 8, 8]


def test_interleaving_divides_the_wait():
    parts = [PhaseSeconds(prefix_forward=0.5, prefix_backward=1.0)] * 7
    parts.append(PhaseSeconds(suffix_forward=0.5, suffix_backward=1.0))
    timeline = simulate_interleaved(parts, 4, 8)
    well_formed(timeline)
    assert timeline.work == pytest.approx(8 * 12)
    # (P − 1)/(V·M + P − 1) with V parts a stage.
    assert timeline.bubble == pytest.approx(3 / (2 * 8 + 3))
    with pytest.raises(ValueError, match="multiples"):
        simulate_interleaved(parts, 4, 6)


def test_pipelined_context_ranks():
    prefix = PhaseSeconds(prefix_forward=0.12, prefix_backward=0.27)
    last = PhaseSeconds(suffix_forward=0.16, suffix_backward=0.44)
    timeline = simulate("1f1b", [prefix, last], 2, 4)
    well_formed(timeline)
    assert timeline.workers == 4
    assert timeline.work == pytest.approx(4 * 0.99)


def test_tasks_that_wait_for_each_other_are_a_deadlock():
    simulation = Simulation(2)
    simulation.add(Task(0, "a", 0, 0, 1.0, after=[(1, 0.0)]))
    simulation.add(Task(1, "b", 0, 0, 1.0, after=[(0, 0.0)]))
    with pytest.raises(DeadlockError, match="2 of 2"):
        simulation.run()


def test_cuts_are_uneven_where_the_suffix_is_heavy():
    # Suffix and head weigh as much as 36 of the 24 prefix blocks: all of the prefix goes first.
    assert cut_prefix(24, 2, 2, 1.0, 36.0) == [24, 0]
    assert cut_prefix(24, 2, 2, 1.0, 4.0) == [14, 10]
    assert sum(cut_prefix(24, 8, 4, 1.0, 12.0)) == 24
    assert min(cut_prefix(7, 8, 4, 1.0, 12.0)[:-1]) == 1
