"""What is said of a rank that is gone or does not answer, and that nobody waits for it for ever."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ttt_megatron.parallel.launcher import WorkerError, launch
from ttt_megatron.parallel.lost_ranks import LostRankError, telling_of_lost_ranks
from ttt_megatron.parallel.meeting import Meeting, meet, place_of, state_of

TIMEOUT = timedelta(seconds=8)
STOPPED_SECONDS = 14


@pytest.fixture(autouse=True)
def _own_sigterm() -> Iterator[None]:
    """A lost rank leaves a handler behind, as its process is about to end."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def _hang() -> None:
    """Rank 1 is stopped while the others wait for it in a reduction."""
    meeting = meet(TIMEOUT)
    with telling_of_lost_ranks(meeting):
        place = {"rank": meeting.rank, "world_size": meeting.world_size}
        dist.init_process_group("gloo", store=meeting.store, timeout=TIMEOUT, **place)
        dist.all_reduce(torch.ones(1))
        if meeting.rank == 1:
            # The launcher's SIGTERM is taken only when it goes on again.
            subprocess.Popen(["sh", "-c", f"sleep {STOPPED_SECONDS}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))


def test_a_rank_that_hangs_is_named_within_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(
        WorkerError,
        match=r"rank 0: rank 1 \(process \d+ on \S+\) is stopped: rank 0 waited 8 seconds in vain "
        r"\(parallel\.timeout_minutes\) in all_reduce",
    ):
        launch(_hang, (), 2)
    assert time.monotonic() - start < 60


@pytest.fixture
def pair() -> list[Meeting]:
    """Two ranks that meet in this process."""
    store = dist.HashStore()
    return [
        Meeting(store=store, rank=rank, world_size=2, timeout=timedelta(minutes=2))
        for rank in range(2)
    ]


def _lose_connection(meeting: Meeting, message: str = "Connection closed by peer [::1]:9") -> str:
    """What a rank says then."""
    with pytest.raises(LostRankError) as caught, telling_of_lost_ranks(meeting):
        raise RuntimeError(f"[/src/gloo/transport/tcp/pair.cc:553] {message}. More of it.")
    return str(caught.value)


def test_a_dead_rank_is_named_with_its_process(pair: list[Meeting]) -> None:
    process = subprocess.Popen(["sleep", "60"])
    pair[1].store.set("meeting/place/1", place_of(process.pid))
    assert state_of(pair[0], 1) == "running"
    process.kill()
    told = _lose_connection(pair[0])  # a zombie
    process.wait()
    assert told.startswith(f"rank 1 (process {process.pid} on {socket.gethostname()}) is gone: ")
    assert "rank 0 lost a connection" in told
    assert told.endswith("(Connection closed by peer [::1]:9)")
    assert state_of(pair[0], 1) == "gone"
    assert _lose_connection(pair[0]) == told


def test_a_rank_that_failed_is_told_with_its_own_words(pair: list[Meeting]) -> None:
    with pytest.raises(ValueError, match="seven"), telling_of_lost_ranks(pair[1]):
        raise ValueError("seven")
    assert _lose_connection(pair[0]).startswith("rank 1 ended with ValueError: seven: rank 0 lost")


def test_a_rank_elsewhere_is_missed_if_it_does_not_answer(pair: list[Meeting]) -> None:
    elsewhere = place_of(os.getpid()).split("\t")
    pair[1].store.set("meeting/place/1", "\t".join(["elsewhere", *elsewhere[1:]]))
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(_lose_connection, pair[0], "Timed out waiting 120000ms for recv")
        time.sleep(0.3)
        pair[1].put("answer", "here")
        assert "rank 0 waited 2 minutes in vain (parallel.timeout_minutes), though" in told.result()


@pytest.mark.parametrize("after", [False, True])
def test_sigterm_waits_for_the_message_alone(after: bool, pair: list[Meeting]) -> None:
    """What torchrun sends to the ranks that are left must not keep them from telling why."""
    asked: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    pair[1].put("last words", "gone")
    try:
        with suppress(LostRankError), telling_of_lost_ranks(pair[0]):
            try:
                raise RuntimeError("gloo: Connection closed by peer" if after else "of its own")
            finally:
                signal.raise_signal(signal.SIGTERM)
    except RuntimeError:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert asked == ([] if after else [signal.SIGTERM])
