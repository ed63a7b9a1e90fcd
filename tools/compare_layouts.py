"""Runs a recipe under several layouts from the same start and compares the loss curves.

    python tools/compare_layouts.py recipes/demo/stage1.yaml parallel.data=1 parallel.tensor=2 \\
        parallel.context=2 parallel.pipeline=2 --steps 100 --output curves

A layout is one or more settings joined by commas; the first one is what the others are compared
with. Prints the losses and their largest relative difference, and draws the curves.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ttt_megatron.errors import UserError
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics

ROWS = 8
"""Steps shown in the table."""
SMALLEST_GAP = 1e-9
"""Shown for curves that are equal."""


def run(
    recipe: str, layout: str, steps: int, output: Path, settings: list[str]
) -> dict[int, float]:
    """The training losses by step of the recipe under a layout."""
    overrides = ["parallel.data=1", *layout.split(","), *settings]
    overrides += [
        f"training.steps={steps}",
        f"training.output={output}",
        "training.log_interval=50",
    ]
    command = [sys.executable, "-m", "ttt_megatron.cli.main", "train", recipe, *overrides]
    finished = subprocess.run([*command, "--fresh"], check=False)
    if finished.returncode:
        raise UserError(
            f"{layout}: the training ended with status {finished.returncode}, see above"
        )
    rows = read_metrics(output / METRICS_FILE)
    return {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}


def difference(losses: dict[int, float], expected: dict[int, float]) -> float:
    """The largest relative difference over all steps."""
    if losses.keys() != expected.keys():
        raise UserError("the runs have different steps: give an --output that holds no other run")
    return max(abs(losses[step] / expected[step] - 1) for step in expected)


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """All curves, later ones thinner so that equal ones show; below, how each differs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, layout="constrained"
    )
    first = next(iter(curves.values()))
    for place, (name, losses) in enumerate(curves.items()):
        width = 1.0 + 1.5 * (len(curves) - 1 - place)
        above.plot(list(losses), list(losses.values()), label=name, linewidth=width)
        gaps = [max(abs(losses[step] / first[step] - 1), SMALLEST_GAP) for step in losses]
        if place:
            below.plot(list(losses), gaps, label=name, linewidth=1, color=f"C{place}")
    above.set(ylabel="nats a token")
    above.legend()
    below.set(xlabel="step", ylabel="relative difference to the first", yscale="log")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("layouts", nargs="+", help="settings of a layout, joined by commas")
    parser.add_argument("--steps", type=int, default=100, help="outer steps (default: 100)")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all runs: key=value")
    parser.add_argument("--output", type=Path, default=Path("curves"), help="folder of the runs")
    arguments = parser.parse_args()
    curves: dict[str, dict[int, float]] = {}
    try:
        for layout in arguments.layouts:
            folder = arguments.output / layout.replace(",", "+").replace("parallel.", "")
            curves[layout] = run(arguments.recipe, layout, arguments.steps, folder, arguments.set)
        first = next(iter(curves.values()))
        gaps = {layout: difference(losses, first) for layout, losses in curves.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = sorted({1 + round(i * (len(first) - 1) / (ROWS - 1)) for i in range(ROWS)})
    print("\n| layout | " + " | ".join(f"step {step}" for step in shown) + " | worst difference |")
    print("|---" * (len(shown) + 2) + "|")
    for layout, losses in curves.items():
        cells = [f"{losses[step]:.6f}" for step in shown]
        print(f"| {layout} | " + " | ".join(cells) + f" | {gaps[layout]:.1e} |")
    draw(curves, arguments.output / "curves.png")
    print(f"\n{arguments.output / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
