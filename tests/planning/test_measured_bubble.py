"""Simulated waiting against that of processes which run the same schedule and sleep as work."""

from statistics import mean

import pytest
from sleeping import Run, waiting_shares

from ttt_megatron.parallel.context_tasks import DEBTS
from ttt_megatron.parallel.launcher import launch
from ttt_megatron.planning.schedules import PhaseSeconds, simulate

# Shares of the 3B model at 128K. A rank sleeps this long for every micro-batch.
SECONDS_A_RANK = 0.4
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


def compare(sleeps, margin):
    for run, found in zip(RUNS, launch(waiting_shares, (RUNS, sleeps), 4), strict=True):
        debts = DEBTS if run.order == "zigzag" else None
        timeline = simulate(run.order, [run.seconds], run.ranks, run.micro_batches, debts=debts)
        assert mean(found) == pytest.approx(timeline.bubble, abs=margin), run
        for rank, share in enumerate(found):
            busy = sum(t.seconds for t in timeline.tasks if t.worker == rank)
            assert share == pytest.approx(1 - busy / timeline.seconds, abs=margin), (run, rank)


def test_ranks_wait_as_long_as_simulated():
    compare(sleeps=False, margin=1e-9)


@pytest.mark.slow
def test_ranks_that_sleep_as_work_wait_as_long_as_simulated():
    compare(sleeps=True, margin=0.05)
