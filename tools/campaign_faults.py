"""What is done to the runs of a fault campaign."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from campaign_run import SAVE_INTERVAL, STEPS, CampaignError, Run

Fault = Callable[[Run, random.Random], str]
"""Hurts a run at a moment of its choice; says what it did."""

_EARLIEST, _LATEST = 3, STEPS - 4
_LONGEST_DELAY = 0.15


def _at_random(run: Run, chance: random.Random, earliest: int = _EARLIEST) -> None:
    """Waits for a moment in the midst of some step."""
    step = chance.randint(earliest, _LATEST)
    run.wait_until(lambda: run.step >= step, f"step {step}")
    time.sleep(chance.uniform(0, _LONGEST_DELAY))


def _at_a_checkpoint(run: Run, chance: random.Random) -> None:
    """Waits until one is being written."""
    step = chance.randrange(SAVE_INTERVAL, _LATEST, SAVE_INTERVAL)
    pattern = f"step-{step:08d}.tmp-*/state/*"
    run.wait_until(lambda: any(run.checkpoints.glob(pattern)), f"the checkpoint of step {step}")
    time.sleep(chance.uniform(0, 0.03))


def _to_a_rank(number: signal.Signals) -> Fault:
    """A signal to one rank."""

    def send(run: Run, chance: random.Random) -> str:
        victim = chance.randrange(4)
        process = run.rank(victim)
        _at_random(run, chance)
        process.send_signal(number)
        return f"rank {victim}"

    return send


def kill_launcher(run: Run, chance: random.Random) -> str:
    """SIGKILL to the parent of the ranks."""
    _at_random(run, chance)
    run.launcher().kill()
    return "launcher"


def kill_supervisor(run: Run, chance: random.Random) -> str:
    """SIGKILL to the process that the user started."""
    _at_random(run, chance)
    run.supervisor.kill()
    return "supervisor"


def kill_while_saving(run: Run, chance: random.Random) -> str:
    """SIGKILL to a rank or the launcher while a checkpoint is being written."""
    victim = chance.randrange(-1, 4)
    process = run.rank(max(victim, 0))
    _at_a_checkpoint(run, chance)
    if victim < 0:
        run.launcher().kill()
        return "launcher"
    process.kill()
    return f"rank {victim}"


def kill_while_reading(run: Run, chance: random.Random) -> str:
    """SIGKILL to a rank while it reads its first batches."""
    victim = chance.randrange(4)
    process = run.rank(victim)
    run.wait_until(lambda: bool(run.events()), "the start")
    time.sleep(chance.uniform(0, 0.02))
    process.kill()
    return f"rank {victim}"


def terminate(run: Run, chance: random.Random) -> str:
    """SIGTERM to what the user started, as a batch system sends it."""
    _at_random(run, chance)
    run.supervisor.send_signal(signal.SIGTERM)
    return "supervisor"


def corrupt_newest(run: Run, chance: random.Random) -> str:
    """SIGKILL to all, then damage to the newest checkpoint."""
    _at_random(run, chance, earliest=2 * SAVE_INTERVAL + 1)
    run.supervisor.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while run.processes():
        if time.monotonic() > deadline:
            raise CampaignError("processes outlive their supervisor")
        time.sleep(0.01)
    newest = run.checkpoints / f"step-{run.saved:08d}"
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    path = chance.choice(sorted(files))
    how = chance.choice(("cut", "changed", "removed"))
    if how == "removed":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 0x55
        path.write_bytes(content)
    return f"{path.relative_to(newest)} {how}"


def fill_disk(run: Run, chance: random.Random) -> str:
    """The file system of the run's folder is full for a while."""
    _at_random(run, chance)
    ballast = run.output.parent / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(block))
            except OSError:
                continue
    until = run.step + chance.randint(2, 2 * SAVE_INTERVAL)
    deadline = time.monotonic() + 20
    while not run.is_over() and run.step < min(until, STEPS) and time.monotonic() < deadline:
        time.sleep(0.01)
    ballast.unlink()
    return "full"


def kill_server(run: Run, chance: random.Random) -> str:
    """SIGKILL to the MLflow server that the run is followed by."""
    _at_random(run, chance)
    assert run.server is not None
    os.killpg(run.server.pid, signal.SIGKILL)
    run.server.wait()
    return "server"


FAULTS: dict[str, Fault] = {
    "rank killed": _to_a_rank(signal.SIGKILL),
    "launcher killed": kill_launcher,
    "supervisor killed": kill_supervisor,
    "killed in a checkpoint": kill_while_saving,
    "killed in the first reads": kill_while_reading,
    "SIGTERM to the run": terminate,
    "SIGTERM to a rank": _to_a_rank(signal.SIGTERM),
    "rank stopped (hang)": _to_a_rank(signal.SIGSTOP),
    "newest checkpoint damaged": corrupt_newest,
    "disk full for a while": fill_disk,
    "MLflow server killed": kill_server,
}


NEEDS_DISK = "disk full for a while"
NEEDS_SERVER = "MLflow server killed"


def mount_small(folder: Path) -> None:
    """A file system of its own at `folder`; raises CampaignError where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise CampaignError(
            f"no file system could be made to fill ({made.stderr.strip()}): run as root, or with "
            f"--without {NEEDS_DISK!r}"
        )


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """An MLflow server that answers; its process, the first of a group, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return server, address
        except OSError:
            if time.monotonic() > deadline or server.poll() is not None:
                os.killpg(server.pid, signal.SIGKILL)
                raise CampaignError(f"no MLflow server: see {folder / 'server.log'}") from None
            time.sleep(0.5)
