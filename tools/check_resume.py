"""Kill a training run at random, over and over, and compare it with one left in peace.

    python tools/check_resume.py RECIPE [key=value ...] [--kills 5] [--processes 2] [--seed 0]

Trains the recipe once undisturbed, then again in another folder with SIGKILL after a random time,
to the launcher or to one of its workers, until the given number of kills; then to the end. Every
step's loss must be bitwise equal. At last, the interrupted run's middle checkpoint is continued
with another number of processes, whose losses must agree to `--tolerance`: the rows are then the
same. Exits with status 1 if anything differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ttt_megatron.training.callbacks.metrics_log import METRICS_FILE, read_metrics


def start(arguments: list[str], output: Path, processes: int) -> subprocess.Popen[bytes]:
    """The train command as a process."""
    command = [sys.executable, "-m", "ttt_megatron.cli.main", "train", *arguments]
    command += [f"training.output={output}", f"parallel.data={processes}", "tracking.mlflow=false"]
    quiet = subprocess.DEVNULL
    # Equal threads for equal sums, whatever the number of processes.
    threads = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, env=threads)


def finish(arguments: list[str], output: Path, processes: int) -> float:
    """Trains to the end; returns the seconds it took."""
    begun = time.monotonic()
    if start(arguments, output, processes).wait() != 0:
        sys.exit(f"training in {output} failed: run it by hand to see why")
    return time.monotonic() - begun


def losses(output: Path) -> dict[int, float]:
    """Training loss by step."""
    return {
        row["step"]: row["loss"] for row in read_metrics(output / METRICS_FILE) if "loss" in row
    }


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """SIGKILL to the launcher or one of its workers; tells which."""
    workers = psutil.Process(process.pid).children()
    victims = {"launcher": process.pid} | {f"child {w.pid}": w.pid for w in workers}
    name = chance.choice(list(victims))
    os.kill(victims[name], signal.SIGKILL)
    process.wait()
    return name


def interrupt(arguments: list[str], output: Path, processes: int, kills: int, seed: int) -> None:
    """Starts and kills the run, `kills` times, or until it was faster than its killer."""
    chance = random.Random(seed)
    for number in range(1, kills + 1):
        process = start(arguments, output, processes)
        before = max(losses(output), default=0)
        while process.poll() is None and max(losses(output), default=0) <= before:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))
        if process.poll() is not None:
            print(f"the run ended before kill {number}", flush=True)
            return
        name = kill(process, chance)
        print(f"kill {number}: {name} after step {max(losses(output), default=0)}", flush=True)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--other-processes", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative, for other sizes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()
    arguments = [options.recipe, *options.overrides]
    with tempfile.TemporaryDirectory() as folder:
        peace, war, other = (Path(folder) / name for name in ("peace", "war", "other"))
        print(f"undisturbed: {finish(arguments, peace, options.processes):.0f} s", flush=True)
        interrupt(arguments, war, options.processes, options.kills, options.seed)
        shutil.copytree(war, other)
        finish(arguments, war, options.processes)
        finish(arguments, other, options.other_processes)
        exact, resumed, resized = losses(peace), losses(war), losses(other)
    different = [step for step in exact if resumed.get(step) != exact[step]]
    far = max(abs(resized[s] - exact[s]) / abs(exact[s]) for s in exact)
    print(f"{len(exact)} steps, {len(different)} losses differ after kills; worst relative")
    print(f"difference with {options.other_processes} process(es): {far:.1e}")
    return int(bool(different) or resumed.keys() != exact.keys() or far > options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
