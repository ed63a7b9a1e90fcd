"""Starts a training again when it was cut off, a bounded number of times.

Of several machines, torchrun and the batch system do this; here it is done for one, where the
launcher of the ranks may itself be killed. The child is a process group of its own: nothing of it
is left when the next attempt begins, nor when this process ends.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

import psutil

from ttt_megatron.resilience.lifeline import die_with

SUPERVISOR = "TTT_MEGATRON_SUPERVISOR"
"""Environment variable: the process id of the supervisor, in what it starts."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SIGNALLED = 128
_POLL_SECONDS = 0.05
_GONE_SECONDS = 2.0

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often, and after how long.

    `max_restarts` counts those since the newest checkpoint became newer; the wait before one
    doubles from `first_wait` to `longest_wait` seconds.
    """

    max_restarts: int
    first_wait: float = 5.0
    longest_wait: float = 300.0

    def wait_before(self, restart: int) -> float:
        """Seconds before the restart of this number, from 1 on, since there was progress."""
        return min(self.first_wait * 2.0 ** (restart - 1), self.longest_wait)


@dataclass
class Supervisor:
    """Runs `command(restarts)` until it is done, or not to be tried again.

    `progress` gives the newest complete checkpoint's step; `final` the exit statuses after which
    trying again is of no use; `tell` takes sentences for people. `attempt` is the name of the
    environment variable by which the child knows how often it was started again.
    """

    command: Callable[[int], Sequence[str]]
    policy: RestartPolicy
    progress: Callable[[], int]
    final: frozenset[int]
    tell: Tell
    attempt: str
    _child: subprocess.Popen[bytes] | None = None
    _asked: int | None = None
    _environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(self) -> int:
        """The exit status of the last attempt; of a child that a signal killed, 128 + its number.

        SIGTERM and SIGINT are passed on, and nothing is started after them.
        """
        restarts, since, best = 0, 0, self.progress()
        with self._forwarding():
            while True:
                status = self._once(restarts)
                if self._asked is not None or not self._worth_trying(status):
                    return status if status >= 0 else _SIGNALLED - status
                reached = self.progress()
                if reached > best:
                    best, since = reached, 0
                how = _in_words(status)
                if since >= self.policy.max_restarts:
                    self.tell(
                        f"{how} for the {since + 1}. time since step {max(best, 0)}: not started "
                        f"again (--max-restarts {self.policy.max_restarts}). See the messages "
                        f"above; the same command goes on from the newest checkpoint"
                    )
                    return status if status >= 0 else _SIGNALLED - status
                since, restarts = since + 1, restarts + 1
                wait = self.policy.wait_before(since)
                self.tell(
                    f"{how}; starting again in {wait:g} s from step {max(reached, 0)}, restart "
                    f"{since} of {self.policy.max_restarts} since then"
                )
                if not self._pause(wait):
                    return _SIGNALLED + (self._asked or 0)

    def _worth_trying(self, status: int) -> bool:
        stopped = status - _SIGNALLED in _SIGNALS  # asked to by somebody, and saved
        return status not in self.final and not stopped

    def _once(self, restarts: int) -> int:
        environment = {
            **self._environment,
            SUPERVISOR: str(os.getpid()),
            self.attempt: str(restarts),
        }
        # Ctrl-C reaches this process alone, which passes it on once.
        self._child = subprocess.Popen(self.command(restarts), env=environment, process_group=0)
        try:
            if self._asked is not None:
                self._child.send_signal(self._asked)
            return self._child.wait()
        finally:
            _clear(self._child.pid)
            self._child = None

    def _pause(self, seconds: float) -> bool:
        """Waits; whether nobody asked to stop in the meantime."""
        deadline = time.monotonic() + seconds
        while self._asked is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return self._asked is None

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        def forward(number: int, frame: FrameType | None) -> None:
            self._asked = number
            if self._child is not None:
                self._child.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _in_words(status: int) -> str:
    if status < 0:
        return f"the run was killed by {signal.Signals(-status).name}"
    return f"the run ended with status {status}"


def _clear(group: int) -> None:
    """Returns when no process of the group is left; those that stay are killed."""
    deadline = time.monotonic() + _GONE_SECONDS
    while _lives(group):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _lives(group: int) -> bool:
    """Whether the group has a process that is no zombie, which nobody may ever reap."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_with_supervisor() -> None:
    """In what a supervisor started: ends with it, even by SIGKILL. Does nothing elsewhere."""
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is not None:
        die_with(int(supervisor))
