"""What a rank says when others have gone, or do not answer any more.

Gloo names an address and NCCL nothing at all. Here the ranks that notice call the roll: of those
on the same machine the process table tells, the others have to answer through the store.
"""

import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistError

import ttt_megatron
from ttt_megatron.parallel.launcher import WorkerError
from ttt_megatron.parallel.meeting import Meeting, describe, in_words, state_of

_COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.I)
_TIMEOUT = re.compile(r"timed? ?out", re.I)
_ROLL_CALL = timedelta(seconds=5)
_POLL_SECONDS = 0.1
_LONGEST_LAST_WORDS = 300
_PACKAGE = Path(ttt_megatron.__file__).parent


class LostRankError(WorkerError):
    """Another rank is gone or does not answer; the message names it and says what to do."""


@contextmanager
def telling_of_lost_ranks(meeting: Meeting) -> Iterator[None]:
    """Raises LostRankError in the place of the errors that communication with others ends in.

    Other errors pass through; what they say is left for the ranks that will miss this one.
    """
    previous = _hold_sigterm()
    try:
        yield
        _restore_sigterm(previous)
    except Exception as error:
        lost = meeting.world_size > 1 and is_communication(error)
        # A store that another rank held may have gone with it.
        with suppress(RuntimeError):
            meeting.store.set_timeout(_ROLL_CALL)
            if lost:
                meeting.put("answer", "here")
            else:
                words = f"{type(error).__name__}: {error}"
                meeting.put("last words", words[:_LONGEST_LAST_WORDS])
        if lost:
            # The hold on SIGTERM stays: the message has yet to be shown.
            raise LostRankError(_message(meeting, error)) from error
        _restore_sigterm(previous)
        raise


def _hold_sigterm() -> Any:
    """Puts SIGTERM off while the loss of a rank is being told; returns the handler until now.

    Torchrun sends it to the ranks that are left as soon as one is gone, mostly before they have
    said why they stopped.
    """
    previous = signal.getsignal(signal.SIGTERM)

    def hold(number: int, frame: FrameType | None) -> None:
        error = sys.exc_info()[1]
        if error is None or not (is_communication(error) or isinstance(error, LostRankError)):
            signal.signal(number, previous)
            signal.raise_signal(number)

    if previous is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, hold)


def _restore_sigterm(previous: Any) -> None:
    if previous is not None:
        signal.signal(signal.SIGTERM, previous)


def is_communication(error: BaseException) -> bool:
    """Whether an error is about talking to other ranks, rather than one of this rank's own."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_COMMUNICATION.search(str(error)))


def _message(meeting: Meeting, error: Exception) -> str:
    try:
        missing = _call_roll(meeting)
    except RuntimeError:
        missing = ["the process that held the ranks' store (rank 0, or torchrun's first) is gone"]
    if _TIMEOUT.search(str(error)):
        wait = in_words(meeting.timeout)
        what = f"waited {wait} in vain (parallel.timeout_minutes)"
    else:
        what = "lost a connection"
    where = f"rank {meeting.rank} {what}{_where(error)}"
    if not missing:
        return (
            f"{where}, though every rank seems to be there: see the other ranks' last messages, "
            f"and whether they took part in the same operation ({_first_line(error)})"
        )
    return (
        f"{'; '.join(missing)}: {where}. See that rank's last message, and whether its machine "
        f"killed it for want of memory (dmesg); the same command goes on from the last checkpoint "
        f"({_first_line(error)})"
    )


def _call_roll(meeting: Meeting) -> list[str]:
    """The ranks of which there is something to say, and what."""
    silent = [rank for rank in range(meeting.world_size) if rank != meeting.rank]
    deadline = time.monotonic() + _ROLL_CALL.total_seconds()
    while silent and time.monotonic() < deadline:
        found = [told for rank in silent if (told := _fate(meeting, rank)) is not None]
        if found:
            return found
        silent = [rank for rank in silent if meeting.find("answer", rank) is None]
        time.sleep(_POLL_SECONDS)
    return [f"{describe(meeting, rank)} does not answer" for rank in silent]


def _fate(meeting: Meeting, rank: int) -> str | None:
    """What is known of a rank that has failed; None if it may be well."""
    words = meeting.find("last words", rank)
    if words is not None:
        return f"{describe(meeting, rank)} ended with {words}"
    state = state_of(meeting, rank)
    return f"{describe(meeting, rank)} is {state}" if state in ("gone", "stopped") else None


def _where(error: Exception) -> str:
    """The operation that failed, and the function of ours that asked for it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    theirs = [frame for frame in frames if "torch/distributed" in frame.filename]
    names = [f.name for f in theirs if f.name != "wrapper" and not f.name.startswith("_")]
    operation = f" in {names[0]}" if names else ""
    if not ours:
        return operation
    file = Path(ours[-1].filename).relative_to(_PACKAGE.parent)
    caller = f"{ours[-1].name} ({file}:{ours[-1].lineno})"
    return f"{operation}, called by {caller}" if operation else f" in {caller}"


def _first_line(error: Exception) -> str:
    """Its first sentence, without the place in C++ that it comes from."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.sub(r"^\[\S*\] ", "", line).split(". ")[0]
