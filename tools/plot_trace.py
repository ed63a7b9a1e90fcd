"""Draw the traces of all ranks as one picture: a lane a rank, a colour a kind of work.

    python tools/plot_trace.py runs/cp2/trace --output trace.png
    python tools/plot_trace.py runs/cp2/trace --from-ms 100 --to-ms 400

Prints the share of time each rank spends in each kind, waiting included.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

from ttt_megatron.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

Spans = dict[int, list[tuple[str, float, float]]]


def read_traces(folder: Path) -> Spans:
    """(name, start, duration) in ms by rank, from the earliest start on, in order of starts.

    Raises UserError if the folder holds no trace.
    """
    spans: Spans = {}
    for path in sorted(folder.glob("rank-*.json")):
        try:
            events = json.loads(path.read_text())["traceEvents"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is not a trace ({error}): run the training again") from error
        for event in events:
            if event["ph"] == "X":
                found = (event["name"], event["ts"] / 1000, event["dur"] / 1000)
                spans.setdefault(event["pid"], []).append(found)
    if not spans:
        raise UserError(f"{folder} holds no rank-*.json: train with training.trace=true first")
    origin = min(start for rows in spans.values() for _, start, _ in rows)
    return {
        rank: sorted(((n, s - origin, d) for n, s, d in rows), key=lambda row: (row[1], -row[2]))
        for rank, rows in sorted(spans.items())
    }


def shares(spans: Spans) -> dict[int, dict[str, float]]:
    """Each kind's share of the whole recorded time, by rank."""
    end = max(start + length for rows in spans.values() for _, start, length in rows)
    totals: dict[int, dict[str, float]] = {}
    for rank, rows in spans.items():
        kinds = totals.setdefault(rank, {})
        for name, _, length in rows:
            kinds[name] = kinds.get(name, 0.0) + length / end
    return totals


def draw(spans: Spans, path: Path, window: tuple[float, float] | None) -> None:
    """Write the picture. Spans inside others are drawn over them."""
    names = list(dict.fromkeys(name for rows in spans.values() for name, _, _ in rows))
    palette = plt.get_cmap("tab10")
    colour = {name: palette(index % 10) for index, name in enumerate(sorted(names))}
    figure, axes = plt.subplots(figsize=(14, 1.5 + 0.6 * len(spans)), constrained_layout=True)
    for lane, rows in enumerate(spans.values()):
        bars = [(start, length) for _, start, length in rows]
        colours = [colour[name] for name, _, _ in rows]
        axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colours)
    axes.set_yticks(range(len(spans)), [f"rank {rank}" for rank in spans])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    if window is not None:
        axes.set_xlim(*window)
    handles = [Patch(color=colour[name], label=name) for name in sorted(names)]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of rank-*.json")
    parser.add_argument("--output", type=Path, help="PNG to write (default: FOLDER/trace.png)")
    parser.add_argument("--from-ms", type=float, help="left edge")
    parser.add_argument("--to-ms", type=float, help="right edge")
    arguments = parser.parse_args()
    try:
        spans = read_traces(arguments.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    window = None
    if arguments.from_ms is not None or arguments.to_ms is not None:
        window = (arguments.from_ms or 0.0, arguments.to_ms)
    path = arguments.output or arguments.folder / "trace.png"
    draw(spans, path, window)
    for rank, kinds in shares(spans).items():
        line = "  ".join(f"{name} {share:.1%}" for name, share in sorted(kinds.items()))
        print(f"rank {rank}: {line}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
