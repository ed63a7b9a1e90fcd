"""torchrun on a node of a cluster: `python -m ttt_megatron.parallel.node` with its arguments.

Asked to end by SIGTERM, torchrun asks its processes and waits for them, but a second SIGTERM, which
Slurm sends where another node was quicker, would break the wait off, and it fails in the end. Here
later ones are left alone, and an end that was asked for is no failure.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

EXIT_FAILED = 1


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun; 0 if its processes succeeded or were asked to end, 1 if one failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise SignalException("asked to end", sigval=signal.SIGTERM)

    signal.signal(signal.SIGTERM, ask)
    try:
        # That torchrun does not take SIGTERM from the handler above.
        torchrun(["--signals-to-handle", signal.SIGINT.name, *arguments])
    except SignalException:
        return 0
    except ChildFailedError as failed:
        # The rank's own message stands above; torchrun would add two pages to it.
        rank, failure = failed.get_first_failure()
        print(f"rank {rank} failed ({_death(failure.exitcode)})", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _death(exit_code: int) -> str:
    if exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    return f"exit status {exit_code}"


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a rendezvous whose other nodes are gone would be waited for.
    os._exit(status)
