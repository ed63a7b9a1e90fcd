"""How close training in float8 comes to training in float32, on the demo's first stage.

    python tools/measure_fp8.py train --data demo/data --output demo/fp8
    python tools/measure_fp8.py gradient --data demo/data --run demo/fp8/fp32-1

`train` trains every way at every seed, one run after another (about 3 minutes each on one core),
and prints losses and, in brackets, what they are above the float32 run of the same seed, in nats.
Finished runs are not done again. `gradient` takes a trained model and prints the cosine of its
meta-gradient in float8 to float64's, of all parameters together and of each kind. Both exit with 1
if a bound is missed.

`demo/data` is what `make demo` prepares. Everything runs on the CPU; what is not in float8 is
computed in float32, unless a way says otherwise.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fp8_gradient import print_cosines

RECIPE = Path(__file__).parents[1] / "recipes/demo/stage1.yaml"
FLOAT8 = ("training.precision=fp8", "fp8.compute=fp32")
WAYS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp32-reordered": ("training.micro_batch_size=8",),
    "tensor-current": FLOAT8,
    "tensor-delayed": (*FLOAT8, "fp8.recipe=delayed"),
    "row-current": (*FLOAT8, "fp8.scaling=row"),
    "bf16": ("training.precision=bf16",),
    "tensor-current-bf16": ("training.precision=fp8",),
}
"""Ways to train, and what they change of the recipe. The second is float32 too, its gradients
summed in another order: how far apart are two runs that differ in rounding alone?
"""
LAST = 20
"""Steps at the end whose losses are averaged."""
BOUND = 0.05
"""Nats that runs may end above the float32 runs of their seeds: each in the last step's loss, and
all of a way on average on held-out text, where float32's own seeds lie further apart than this.
"""


def train(way: str, seed: int, options: argparse.Namespace) -> Path:
    """The run's folder; trains if it does not hold all steps."""
    folder = Path(options.output) / f"{way}-{seed}"
    if len(_losses(folder)) >= options.steps and _validation(folder) is not None:
        return folder
    settings = {
        "data.path": Path(options.data).resolve(),
        "training.output": folder.resolve(),
        "training.seed": seed,
        "training.steps": options.steps,
        "training.save_interval": options.steps,
        "training.eval_sequences": options.sequences,
        "parallel.data": 1,
        "tracking.mlflow": "false",
        "tracking.progress": "false",
    }
    overrides = [*(f"{key}={value}" for key, value in settings.items()), *WAYS[way]]
    command = [sys.executable, "-m", "ttt_megatron.cli.main", "train", str(RECIPE), *overrides]
    subprocess.run(
        command, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return folder


def _rows(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in _rows(folder) if "loss" in row]


def _validation(folder: Path) -> float | None:
    found = [row["validation_loss"] for row in _rows(folder) if "validation_loss" in row]
    return found[-1] if found else None


def _ends(folder: Path) -> dict[str, float]:
    """Loss on held-out text, mean training loss of the last steps, and the last step's."""
    validation, losses = _validation(folder), _losses(folder)
    if validation is None:
        raise SystemExit(f"{folder} has no held-out loss: remove it, to train it again")
    return {
        "held out": validation,
        f"last {LAST} steps": statistics.fmean(losses[-LAST:]),
        "last step": losses[-1],
    }


def compare(options: argparse.Namespace) -> int:
    """Train all, print the table, and tell whether every way ended within the bound."""
    ways = ["fp32", *(way for way in options.ways if way != "fp32")]
    above: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for seed in options.seeds:
        base = _ends(train("fp32", seed, options))
        for way in ways:
            ends = _ends(train(way, seed, options))
            above[way].append({name: end - base[name] for name, end in ends.items()})
            cells = [
                f"{name} {end:.4f} ({above[way][-1][name]:+.4f})" for name, end in ends.items()
            ]
            print(f"{way:20} seed {seed}  {'  '.join(cells)}", flush=True)
    print("less fp32: mean (least, most)")
    missed = []
    for way in ways[1:]:
        spans = {}
        for name in above[way][0]:
            less = [one[name] for one in above[way]]
            spans[name] = statistics.fmean(less), min(less), max(less)
        cells = [f"{n} {m:+.4f} ({lo:+.4f} {hi:+.4f})" for n, (m, lo, hi) in spans.items()]
        print(f"{way:20} {'  '.join(cells)}")
        if spans["last step"][2] > BOUND or spans["held out"][0] > BOUND:
            missed.append(way)
    print(f"more than {BOUND} nats above fp32: {', '.join(missed) or 'none'}")
    return int(bool(missed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the two measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train every way at every seed")
    training.add_argument("--output", required=True, help="folder of the runs")
    training.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    training.add_argument("--steps", type=int, default=200)
    training.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:5])
    training.add_argument("--sequences", type=int, default=128, help="held-out sequences")
    gradient = commands.add_parser("gradient", help="compare a trained model's meta-gradient")
    gradient.add_argument("--run", required=True, help="folder of a finished run")
    gradient.add_argument("--sequences", type=int, default=8, help="held-out sequences")
    for command in (training, gradient):
        command.add_argument("--data", required=True, help="folder of prepared data")
    options = parser.parse_args(arguments)
    if options.command == "train":
        return compare(options)
    return print_cosines(Path(options.run), Path(options.data), options.sequences)


if __name__ == "__main__":
    sys.exit(main())
