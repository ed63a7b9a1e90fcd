"""Simulated waiting against that of processes which run the same schedule and sleep as work."""

from dataclasses import replace
from statistics import mean

import pytest
from measure_bubble import library_order, passes_of, replay, steps_of
from ranks import launch
from sleeping import Run, waiting_shares

from ttt_megatron.config import ParallelConfig, RunConfig
from ttt_megatron.parallel.context_tasks import DEBTS
from ttt_megatron.planning.schedules import PhaseSeconds, simulate

# Shares of the 3B model at 128K. A rank sleeps this long for every micro-batch.
SECONDS_A_RANK = 0.8
SHARES = {
    "prefix_forward": 0.125,
    "prefix_backward": 0.274,
    "suffix_forward": 0.160,
    "suffix_backward": 0.361,
    "suffix_weights": 0.080,
}


def run(order, ranks, micro_batches):
    seconds = PhaseSeconds(**{k: v * SECONDS_A_RANK * ranks for k, v in SHARES.items()})
    if order == "1f1b":
        seconds = seconds.joined()
    return Run(order, ranks, micro_batches, seconds)


RUNS = [
    run(order, ranks, micro_batches)
    for order in ("1f1b", "zigzag")
    for ranks, numbers in ((2, (1, 2, 4)), (4, (2, 4, 8)))
    for micro_batches in numbers
]


def compare(runs, sleeps, margin):
    for run, found in zip(runs, launch(waiting_shares, (runs, sleeps), 4), strict=True):
        debts = DEBTS if run.order == "zigzag" else None
        timeline = simulate(run.order, [run.seconds], run.ranks, run.micro_batches, debts=debts)
        assert mean(found) == pytest.approx(timeline.bubble, abs=margin), run
        for rank, share in enumerate(found):
            busy = sum(t.seconds for t in timeline.tasks if t.worker == rank)
            assert share == pytest.approx(1 - busy / timeline.seconds, abs=margin), (run, rank)


def test_ranks_wait_as_long_as_simulated():
    compare(RUNS, sleeps=False, margin=1e-9)


@pytest.mark.slow
def test_ranks_that_sleep_as_work_wait_as_long_as_simulated():
    compare([run for run in RUNS if run.micro_batches <= run.ranks], sleeps=True, margin=0.05)


def test_an_order_is_replayed_with_other_lengths():
    for order in ("1f1b", "zigzag"):
        config = replace(RunConfig(), parallel=ParallelConfig(context=2, context_order=order))
        timeline, orders = library_order(config, 4)
        own = {
            (task.worker, (task.phase, task.micro_batch, task.shard)): task.seconds
            for task in timeline.tasks
        }
        again = replay(timeline, orders, own)
        assert again.bubble == pytest.approx(timeline.bubble, abs=1e-12)
        # The others wait for rank 0.
        slower = replay(timeline, orders, {k: v * (2 - k[0]) for k, v in own.items()})
        assert slower.bubble > timeline.bubble


def test_waits_are_taken_out_of_passes():
    rows = [
        ("prefix forward", 0.0, 10.0),
        ("wait for halo", 1.0, 4.0),
        ("suffix forward", 10.0, 20.0),
        ("wait for state", 10.0, 5.0),
        ("optimizer", 40.0, 1.0),
        ("prefix forward", 41.0, 10.0),
        ("wait for stream", 52.0, 3.0),
        ("prefix backward", 55.0, 0.1),
        ("apart backward", 56.0, 2.0),
        ("optimizer", 60.0, 1.0),
    ]
    first, second = steps_of({0: rows})
    assert passes_of(first[0]) == [("prefix_forward", 6.0), ("suffix_forward", 15.0)]
    assert passes_of(second[0]) == [("prefix_forward", 10.0), ("prefix_backward", 2.0)]
