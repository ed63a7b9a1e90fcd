"""Where the processes of a run first meet, before any group of theirs is made.

What they tell each other here goes through torch's key-value store alone: it works where groups
could not be made, and after they have broken.
"""

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
from torch.distributed import DistError, HashStore, PrefixStore, Store, rendezvous

from ttt_megatron.errors import PassingError

DEFAULT_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """This process, `rank` of `world_size`, and the store that it shares with the others.

    `timeout` is that of every wait for them.
    """

    store: Store
    rank: int
    world_size: int
    timeout: timedelta

    def put(self, key: str, text: str) -> None:
        """Leaves a text of this rank for the others."""
        self._notes.set(f"{key}/{self.rank}", text)

    def find(self, key: str, rank: int) -> str | None:
        """What a rank has left under a key; None if there is nothing."""
        name = f"{key}/{rank}"
        return self._notes.get(name).decode() if self._notes.check([name]) else None

    def wait_for(
        self, key: str, ranks: Iterable[int], timeout: timedelta | None = None
    ) -> dict[int, str]:
        """What ranks have left under a key; those that leave nothing within the time are absent."""
        deadline = time.monotonic() + (timeout or self.timeout).total_seconds()
        found = {}
        for rank in ranks:
            left = deadline - time.monotonic()
            # Also where the store has gone with the process that held it.
            with suppress(DistError):
                if left > 0:
                    self._notes.wait([f"{key}/{rank}"], timedelta(seconds=left))
                text = self.find(key, rank)
                if text is not None:
                    found[rank] = text
        return found

    @property
    def _notes(self) -> Store:
        return PrefixStore("meeting", self.store)


def meet(timeout: timedelta = DEFAULT_TIMEOUT) -> Meeting:
    """Joins the processes that torchrun's variables name; without them, a meeting of one.

    Raises UserError if they do not all come within the timeout.
    """
    if "RANK" not in os.environ:
        return Meeting(store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except DistError as error:
        environment = os.environ
        raise PassingError(
            f"the {environment['WORLD_SIZE']} processes did not all meet at "
            f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']} within "
            f"{in_words(timeout)} (parallel.timeout_minutes): see that every one was started and "
            f"can reach that address ({str(error).splitlines()[0]})"
        ) from error
    store.set_timeout(timeout)
    meeting = Meeting(store=store, rank=rank, world_size=world_size, timeout=timeout)
    meeting.put("place", place_of(os.getpid()))
    return meeting


def place_of(process: int) -> str:
    """Host, what tells apart the process tables of one host's containers, process and its start."""
    table = Path("/proc/self/ns/pid")
    table_id = os.readlink(table) if table.is_symlink() else ""
    started = psutil.Process(process).create_time()
    return "\t".join([socket.gethostname(), table_id, str(process), str(started)])


def describe(meeting: Meeting, rank: int) -> str:
    """A rank with its process and host, if it came."""
    place = meeting.find("place", rank)
    if place is None:
        return f"rank {rank}"
    host, _, process, _ = place.split("\t")
    return f"rank {rank} (process {process} on {host})"


def state_of(meeting: Meeting, rank: int) -> str | None:
    """Whether a rank's process runs: "running", "stopped", "gone"; None on another machine."""
    place, own = meeting.find("place", rank), place_of(os.getpid())
    if place is None or place.split("\t")[:2] != own.split("\t")[:2]:
        return None
    _, _, process, started = place.split("\t")
    try:
        found = psutil.Process(int(process))
        if str(found.create_time()) != started or found.status() == psutil.STATUS_ZOMBIE:
            return "gone"
        return "stopped" if found.status() == psutil.STATUS_STOPPED else "running"
    except psutil.NoSuchProcess:
        return "gone"


def in_words(time_span: timedelta) -> str:
    """A timeout for a message: 30 minutes, 5 seconds."""
    seconds = time_span.total_seconds()
    return f"{seconds:g} seconds" if seconds < 60 else f"{seconds / 60:g} minutes"
