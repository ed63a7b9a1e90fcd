"""torchrun on a node of a cluster: `python -m ttt_megatron.parallel.node` with its arguments.

Asked to end by SIGTERM, torchrun asks its processes and waits for them, but a second SIGTERM, which
Slurm sends where another node was quicker, would break the wait off, and it fails in the end. Here
later ones are left alone, and an end that was asked for is no failure, unless a process had not
ended by TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds later and was killed: it may not have saved.

Restarted, torchrun's processes would meet in the store of the first start and find the addresses of
processes that are gone. Here each start has a store of its own, with the first process.
"""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

EXIT_FAILED = 1
_OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# Longer than any step with its checkpoint; processes that hang end by faults.hang_minutes.
_PATIENCE_SECONDS = 3600
_TORCHRUNS_PORT = 29400


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun; 0 if its processes succeeded or were asked to end, 1 if one failed.

    1 as well if one was asked to end, did not, and was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessHandler
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    asked, killed = False, False
    close = SubprocessHandler.close

    def noting_close(self: SubprocessHandler, death_sig: signal.Signals | None = None) -> None:
        nonlocal killed
        killed |= asked and death_sig == signal.SIGKILL
        close(self, death_sig)

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise SignalException("asked to end", sigval=signal.SIGTERM)

    signal.signal(signal.SIGTERM, ask)
    SubprocessHandler.close = noting_close  # type: ignore[method-assign]
    os.environ.setdefault(_OWN_STORES, "1")
    os.environ.setdefault(_PATIENCE, str(_PATIENCE_SECONDS))
    known = parse_args(list(arguments))
    if known.rdzv_endpoint and not known.local_addr:
        alone = known.nnodes.rpartition(":")[2] == "1"
        arguments = ["--local-addr", own_address(known.rdzv_endpoint, alone=alone), *arguments]
    try:
        # That torchrun does not take SIGTERM from the handler above.
        torchrun(["--signals-to-handle", signal.SIGINT.name, *arguments])
    except SignalException:
        if killed:
            print(
                f"a rank had not ended in the time given ({_PATIENCE} or --shutdown-timeout) and "
                f"was killed: the run goes on from its last checkpoint",
                file=sys.stderr,
            )
        return EXIT_FAILED if killed else 0
    except ChildFailedError as failed:
        # The rank's own message stands above; torchrun would add two pages to it.
        rank, failure = failed.get_first_failure()
        print(f"rank {rank} failed ({_death(failure.exitcode)})", file=sys.stderr)
        return EXIT_FAILED
    return 0


def own_address(endpoint: str, *, alone: bool) -> str:
    """This node's address as the endpoint `host[:port]` sees it, for the other nodes to dial.

    A node's own name need not lead the others to it. Where the endpoint's name means a loopback
    address here, as 127.0.1.1 in Debian's /etc/hosts does, this node is the endpoint and others
    reach it by that name: unless it is `alone`, the name is the answer.

    Raises OSError for a host that is not known.
    """
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    host, port = parse_rendezvous_endpoint(endpoint, _TORCHRUNS_PORT)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # Nothing is sent: it only chooses the way.
        probe.connect(address)
        found_here = str(probe.getsockname()[0])
    loopback = ipaddress.ip_address(found_here.partition("%")[0]).is_loopback
    return host if loopback and not alone else found_here


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
