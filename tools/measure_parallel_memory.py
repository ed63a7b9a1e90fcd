"""Memory of a training step on every rank of several layouts, beside the planner's figure.

    python tools/measure_parallel_memory.py
    python tools/measure_parallel_memory.py --layout context=4 --layout tensor=2,context=2 \\
        data.sequence_length=4096

Real processes take a training step of a small model; live tensors are counted throughout, by kind
at the moment when most are live.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from small_training import small_data, small_run

from ttt_megatron.config import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.launcher import launch
from ttt_megatron.planning.layout import recipe_layout
from ttt_megatron.planning.rank_memory import rank_memory

LAYOUTS = (
    "",
    "tensor=2",
    "tensor=2,sequence_parallel=true",
    "context=2",
    "context=4",
    "data=2",
    "tensor=2,context=2",
)
Kinds = dict[str, float]


def measure(config: RunConfig) -> list[Kinds]:
    """Bytes by kind on every rank when most were live."""
    found: list[Kinds] = launch(measure_here, (config,), config.parallel.world_size)
    return found


def measure_here(config: RunConfig) -> list[Kinds]:
    """The same, where this process is one of the ranks. Collective."""
    import torch.distributed as dist
    from memory_kinds import kinds_told, watched_step

    from ttt_megatron.bench.live_bytes import LiveBytes
    from ttt_megatron.training.run import run_training
    from ttt_megatron.training.trainer import Trainer

    steps: list[Counter[str]] = []
    everyone: list[Kinds] = []

    def gather(trainer: Trainer) -> None:
        """In place of the checkpoint after the step."""
        everyone.extend([{}] * config.parallel.world_size)
        dist.all_gather_object(everyone, dict(steps[-1]))

    with LiveBytes() as live, kinds_told(live):
        step = watched_step(Trainer._step, live, steps)
        with patch.object(Trainer, "_step", step), patch.object(Trainer, "save", gather):
            run_training(config, fresh=True)
    return everyone


def planned(config: RunConfig) -> list[Kinds]:
    """The planner's bytes by kind on every rank of a run on CPUs."""
    return rank_memory(config, recipe_layout(config), on_cpu=True)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def compare(folder: Path, layout: str, overrides: Sequence[str]) -> str:
    """Measured and planned KiB of every kind on every rank, as a table."""
    settings = [f"parallel.{item}" for item in layout.split(",") if item]
    config = small_run(folder, [*settings, *overrides])
    measured, expected = measure(config), planned(config)
    names = dict.fromkeys(name for kinds in (*expected, *measured) for name in kinds)
    rows = [
        [layout or "one process", *(f"rank {r}: measured, planned" for r in range(len(measured)))]
    ]
    for name in names:
        pairs = [(m.get(name, 0), p.get(name, 0)) for m, p in zip(measured, expected, strict=True)]
        if any(max(pair) >= 512 for pair in pairs):
            rows.append([name, *(f"{m / 1024:,.0f} {p / 1024:9,.0f}" for m, p in pairs)])
    totals = [(sum(m.values()), sum(p.values())) for m, p in zip(measured, expected, strict=True)]
    rows.append(["total", *(f"{m / 1024:,.0f} {p / 1024:9,.0f}" for m, p in totals)])
    rows.append(["planned over measured", *(f"{p / m - 1:+.1%}" for m, p in totals)])
    return _table(rows)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layout",
        action="append",
        metavar="KEY=N,...",
        help="keys of the recipe's parallel section; can be repeated (default: a list of them)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    arguments = parser.parse_args()
    try:
        with small_data() as folder:
            for layout in arguments.layout or LAYOUTS:
                print(compare(folder, layout, arguments.overrides), end="\n\n", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
