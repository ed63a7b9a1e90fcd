"""Starts the processes of a run on this machine, and tells what went wrong in them.

Underneath is torchrun's elastic launcher. Signals go to this parent alone: it asks the workers to
stop with SIGTERM and waits, however long their current step takes.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from ttt_megatron.errors import PassingError, UserError
from ttt_megatron.parallel.accounts import (
    WorkerError,
    keep_accounts_in,
    leave_account,
    read_accounts,
)
from ttt_megatron.resilience.lifeline import die_with

Result = TypeVar("Result")

_ECHO_SECONDS = 0.5
_SIGNALLED = 128
_OFTEN_MEANS: dict[int, str] = {
    signal.SIGKILL: "; perhaps the machine ran out of memory",
    signal.SIGABRT: "; with NCCL perhaps another rank was gone, or did not answer within "
    "parallel.timeout_minutes: see the lines above",
}


def under_torchrun() -> bool:
    """Whether an outer launcher has already made this process one rank of many."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def naming_rank() -> Iterator[None]:
    """Under torchrun puts the rank before what a UserError says, as `launch` does for its own."""
    try:
        yield
    except UserError as error:
        if under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
            raise type(error)(f"rank {os.environ['RANK']}: {error}") from error
        raise


def available_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(work: Callable[..., Result], arguments: tuple[Any, ...], processes: int) -> Result:
    """Runs `work(*arguments)` in `processes` ranks and returns rank 0's result.

    `work` must be importable and picklable, as must `arguments` and its result. Under torchrun it
    runs in this process, as the one rank it is.

    Raises UserError if torchrun's world size is not `processes`, or with a worker's own UserError,
    and WorkerError if a worker crashed. Of several failed ranks the first to fail is told.
    SIGTERM or SIGINT before the workers listen to it raises SystemExit with 128 + its number.
    """
    if under_torchrun():
        world_size = int(os.environ["WORLD_SIZE"])
        if world_size != processes:
            raise UserError(
                f"torchrun started {world_size} processes, but the recipe's parallel section "
                f"makes {processes}: make them equal"
            )
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun itself, rather than a batch system
            die_with(os.getppid())
        return work(*arguments)
    with (
        tempfile.TemporaryDirectory(prefix="ttt-megatron-") as folder,
        _threads_for(processes),
        _forwarded_signals() as asked,
    ):
        return _run_agent(work, arguments, processes, Path(folder), asked)


def _run_agent(
    work: Callable[..., Result],
    arguments: tuple[Any, ...],
    processes: int,
    folder: Path,
    asked: list[int],
) -> Result:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent reports failures as stack dumps of its own; the ranks' messages say more.
    for noisy in (
        "torch.distributed.elastic",
        "torch.distributed.launcher",
        "torch.multiprocessing",
    ):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        local_addr="localhost",
        # None: the agent's handlers would kill the workers before they could save.
        signals_to_handle="",
    )
    try:
        results = elastic_launch(config, _worker)(str(folder), os.getpid(), work, arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        # Before it listened, with nothing to save.
        if asked and failure.exitcode == -signal.SIGTERM:
            raise SystemExit(_SIGNALLED + asked[0]) from None
        raise _first_failure(folder, processes, rank, failure.exitcode) from None
    return pickle.loads(results[0])


def _worker(
    folder: str, parent: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> bytes:
    """One rank: runs the work; leaves an account of its failure in `folder`."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent turns Ctrl-C into one SIGTERM
    keep_accounts_in(Path(folder))
    try:
        return pickle.dumps(work(*arguments))
    except BaseException as error:
        leave_account(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # Perhaps only the echo of another rank's sudden death: let the agent see that one first.
        time.sleep(_ECHO_SECONDS)
        # A plain exit: the other ranks find the connection closed instead of waiting for this one.
        os._exit(1)


def _first_failure(folder: Path, processes: int, rank: int, exit_code: int) -> Exception:
    """The exception that tells of the rank that failed first."""
    accounts = read_accounts(folder)
    if not any(account["rank"] == rank for account in accounts):
        cause = f"exit code {exit_code}"
        if exit_code < 0:
            cause = f"signal {signal.Signals(-exit_code).name}"
            cause += _OFTEN_MEANS.get(-exit_code, "")
        return WorkerError(f"rank {rank} ended without a message ({cause})")
    first = min(accounts, key=lambda account: account["time"])
    where = f"rank {first['rank']}: " if processes > 1 else ""
    if first["user"]:
        return (PassingError if first["passing"] else UserError)(f"{where}{first['message']}")
    if first["told"]:
        return WorkerError(f"{where}{first['message']}")
    return WorkerError(f"rank {first['rank']} failed:\n{first['traceback'].rstrip()}")


@contextmanager
def _threads_for(processes: int) -> Iterator[None]:
    """Shares the CPUs out among the workers, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, available_cpus() // processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _forwarded_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT ask the workers to stop after their step; a second SIGINT kills them.

    Without any worker, one ends this process. Gives the signals that came.
    """
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        children = multiprocessing.active_children()
        for child in children:
            if child.pid is not None:
                kill = asked.count(signal.SIGINT) > 1
                os.kill(child.pid, signal.SIGKILL if kill else signal.SIGTERM)
        if not children:
            raise SystemExit(_SIGNALLED + number)

    previous = {
        number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
