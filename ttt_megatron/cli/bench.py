"""`ttt-megatron bench`: how fast kernels, inner steps, meta steps and sessions run here."""

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttt_megatron.bench.results import Report

NAME = "bench"
HELP = "Measure kernels, inner steps, meta steps and latencies, against floors and baselines."
EPILOG = """examples:
  ttt-megatron bench --device cpu --small                 everything, tiny, in minutes
  ttt-megatron bench --output results                     125M on the GPU; JSON, Markdown, PNG
  ttt-megatron bench --only kernels --precision bf16 fp32
  ttt-megatron bench --only meta --sizes 125m 760m --lengths 8192 --precision bf16 fp8 --budget 300
  ttt-megatron bench --small --only systems --lengths 256 1024 4096
  ttt-megatron bench --recipe my.yaml --lengths 4096 --output new --compare old/bench.json

sections: kernels (each operation of ttt_kernels beside PyTorch's), inner (one chunk of the suffix),
meta (a training step of TTT-E2E, of the same model without inner steps, of plain sliding-window and
of full attention with as many parameters; in several precisions also the prefix by itself),
latency (prefill and decoding by context length). Only if asked for: systems (reading, decoding, a
training step and FLOPs of every system by context length, and where TTT-E2E becomes cheaper).
What does not fit into memory is reported as such and the rest goes on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to measure; auto is the GPU if there is one (default: %(default)s)",
    )
    add("--small", action="store_true", help="a tiny model and short sequences, for a CPU")
    add(
        "--only",
        nargs="+",
        metavar="SECTION",
        help="kernels, inner, meta, latency (these by default), systems; by spaces or commas",
    )
    add("--sizes", nargs="+", metavar="SIZE", help="published models (default: 125m)")
    add("--recipe", metavar="FILE", help="a recipe's model in their place")
    add(
        "--lengths",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens of a step's sequence, and contexts of latencies (default: 8192 32768 131072; "
        "--small: 256 512 1024)",
    )
    add(
        "--precision",
        nargs="+",
        metavar="P",
        help="as in recipes (default: bf16 on a GPU, fp32 on a CPU)",
    )
    add("--repeats", type=int, default=20, metavar="N", help="runs a kernel (default: %(default)s)")
    add(
        "--step-repeats",
        type=int,
        default=5,
        metavar="N",
        help="runs a step or prompt (default: %(default)s)",
    )
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="skip what would begin after this many seconds",
    )
    add("--output", metavar="DIR", help="write bench.json, bench.md and bench.png into DIR")
    add("--compare", metavar="OLD.json", help="also print ratios to an earlier result")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 if an operation of ours failed; UserError for what cannot be asked."""
    from ttt_megatron.bench.options import make_options
    from ttt_megatron.bench.run import failures, run_benchmark

    options = make_options(**vars(args))
    report = run_benchmark(options, log=lambda line: print(line, file=sys.stderr, flush=True))
    _print(report)
    if options.compare is not None:
        from ttt_megatron.bench.comparison import compare

        _print_table(compare(report, options.compare).rich())
    if options.output is not None:
        from ttt_megatron.bench.plot import draw
        from ttt_megatron.bench.run import STEM

        picture = options.output / f"{STEM}.png"
        files = [options.output / f"{STEM}.json", options.output / f"{STEM}.md"]
        files += [picture] if draw(report, picture) else []
        print("\n".join(map(str, files)))
    failed = failures(report)
    for one in failed:
        print(f"FAILED: {one.operation}, {one.name}: {one.reason}")
    found = Counter(one.status for one in report.results)
    print("cases: " + ", ".join(f"{number} {status}" for status, number in found.items()))
    return 1 if failed else 0


def _print(report: "Report") -> None:
    from ttt_megatron.bench.tables import LEGEND, heading, tables_of

    print(heading(report.about))
    for table in tables_of(report):
        _print_table(table.rich())
    print(LEGEND)


def _print_table(table: object) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(table, Table)
    # Numbers cut short would be of no use: a narrow terminal wraps the lines instead.
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, min(needed, 200))).print(table)
