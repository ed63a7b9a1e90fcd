"""Ending with the process that started this one."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with(parent: int) -> None:
    """Ends this process with its parent, even by SIGKILL, so that no orphan goes on writing.

    And so for those that it forks, each with the process that forked it.
    """
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl
    forking = parent

    def ask_for_death() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != forking:  # already gone, so no signal will come
            os._exit(1)

    def remember_parent() -> None:
        nonlocal forking
        forking = os.getpid()

    ask_for_death()
    # Not inherited by fork: mcore's checkpoint writers would be left waiting for ever.
    os.register_at_fork(before=remember_parent, after_in_child=ask_for_death)
