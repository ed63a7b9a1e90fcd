"""FLOPs, CPU seconds and peak memory of one meta step, relative to a plain step of the same model.

    python tools/measure_meta_cost.py
    python tools/measure_meta_cost.py --chunks 16 --variants plain recompute

Every variant runs in a process of its own, one thread each, in turn, for several rounds; medians
are printed. FLOPs are those of matrix products, counted as they run. Peak memory is the process's
high-water mark above its size before the model was built: weights, gradients and activations.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ttt_megatron.meta.learner import Learner

    Batch = tuple[Tensor, Tensor, Tensor]

VARIANTS = (
    "plain",
    "recompute",
    "save_activations",
    "save_all",
    "two_level",
    "first_order",
    "oracle",
)
BOUNDS = {
    ("recompute", "flops"): 1.55,
    ("save_all", "flops"): 1.40,
    ("recompute", "peak_bytes"): 1.05,
    ("recompute", "cpu_seconds"): 1.6,
}


def resident_bytes(key: str) -> int:
    """A field of the process's status: VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def build(arguments: argparse.Namespace, variant: str) -> "tuple[Learner, Batch]":
    """A learner of the given shape and one batch for it."""
    import torch
    from meta_shape import shape_of

    from ttt_megatron.config.schema import InnerConfig
    from ttt_megatron.meta.learner import Learner

    policies = ("recompute", "save_activations", "save_all")
    modes = {"plain": "off", "first_order": "first_order"}
    inner = InnerConfig(
        mode=modes.get(variant, "meta"),  # type: ignore[arg-type]
        chunk_size=arguments.chunk,
        memory_policy=variant if variant in policies else "recompute",  # type: ignore[arg-type]
        two_level=variant == "two_level",
    )
    learner = Learner(shape_of(arguments), inner)
    tokens = torch.randint(
        arguments.vocabulary, (arguments.batch, arguments.chunks * arguments.chunk + 1)
    )
    return learner, (
        tokens[:, :-1],
        tokens[:, 1:],
        torch.ones_like(tokens[:, 1:], dtype=torch.bool),
    )


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one variant in this process."""
    import torch
    from count_flops import count_flops

    torch.set_num_threads(1)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    before = resident_bytes("VmRSS")
    learner, (tokens, targets, mask) = build(arguments, arguments.measure)

    def step() -> None:
        if arguments.measure == "oracle":
            from ttt_megatron.meta.oracle import oracle

            settings = learner.settings(learner.inner.lr, tokens.shape[1])
            oracle(learner.model, tokens, targets, mask, settings).loss.backward()
        else:
            learner(tokens, targets, mask).loss.backward()

    if arguments.figure == "memory":
        step()
        Path("/proc/self/clear_refs").write_text("5")
        step()
        return {"peak_bytes": float(resident_bytes("VmHWM") - before)}
    flops = count_flops(step)
    seconds = []
    for _ in range(arguments.repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return {"flops": float(flops), "cpu_seconds": statistics.median(seconds)}


def measure_apart(variant: str, figure: str) -> dict[str, float]:
    """Measure one variant in a process of its own.

    For memory, the C library is told to give freed blocks back at once, which costs time.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if figure == "memory":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    options = ["--measure", variant, "--figure", figure]
    command = [sys.executable, __file__, *sys.argv[1:], *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{variant} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(rounds: dict[str, list[dict[str, float]]]) -> int:
    """Print the table; returns the number of bounds exceeded."""
    medians = {
        variant: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for variant, results in rounds.items()
    }
    plain = medians["plain"]
    print(f"{'variant':18s}   GFLOP  ratio    CPU s  ratio  peak MB  ratio")
    exceeded = 0
    for variant, row in medians.items():
        ratio = {key: value / plain[key] for key, value in row.items()}
        notes = []
        for (name, key), bound in BOUNDS.items():
            if name == variant and ratio[key] > bound:
                exceeded += 1
                notes.append(f"{key} beyond {bound}")
        print(
            f"{variant:18s}{row['flops'] / 1e9:8.2f} {ratio['flops']:6.3f} "
            f"{row['cpu_seconds']:8.3f} {ratio['cpu_seconds']:6.3f} "
            f"{row['peak_bytes'] / 1e6:8.1f} {ratio['peak_bytes']:6.3f}  {'; '.join(notes)}"
        )
    return exceeded


def main() -> int:
    """Entry point."""
    from meta_shape import add_shape

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape(
        parser,
        prefix=12,
        suffix=4,
        width=256,
        heads=4,
        mlp=512,
        vocabulary=2048,
        chunk=256,
        window=1024,
    )
    parser.add_argument("--chunks", type=int, default=8, help="chunks a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--figure", choices=("time", "memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return 0
    variants = ["plain", *(v for v in arguments.variants if v != "plain")]
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for index in range(arguments.rounds):
        for variant in variants:
            print(f"round {index + 1}/{arguments.rounds}: {variant}", file=sys.stderr)
            figures = measure_apart(variant, "time") | measure_apart(variant, "memory")
            rounds[variant].append(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=1))
    return 1 if report(rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
