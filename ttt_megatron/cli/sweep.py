"""`ttt-megatron sweep`: runs that differ in a few settings, and one table of them."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.sweeps.points import Point
    from ttt_megatron.sweeps.run import SweepEnd
    from ttt_megatron.sweeps.spec import Sweep

NAME = "sweep"
HELP = "Train what differs in a few settings, with seeds, into one table and plot."
EPILOG = """examples:
  ttt-megatron sweep recipes/sweeps/small-window.yaml --dry-run     the points, and how far they are
  ttt-megatron sweep recipes/sweeps/small-window.yaml --jobs 2 data.path=data/mine
  ttt-megatron sweep recipes/sweeps/small-window.yaml --only window_size-32_seed-1
  ttt-megatron sweep recipes/sweeps/760m-window.yaml --slurm --jobs 4

The same command again goes on: finished points are not run again, others go on from their newest
checkpoint. Ctrl-C or SIGTERM ends running points after their step, with a checkpoint. The exit
status is 1 if a point failed, and 128 + the signal if one ended it. docs/sweeps.md has the file's
keys."""

EXIT_FAILED = 1
EXIT_SIGNAL_BASE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("sweep", metavar="SWEEP", help="a YAML file that names a recipe and what to vary")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of all points, over the recipe's and the sweep's own",
    )
    add(
        "--output",
        metavar="FOLDER",
        help="folder of runs, logs and tables (default: the file's, else runs/sweeps/NAME)",
    )
    add("--jobs", type=int, metavar="N", help="points at a time (default: 1)")
    add("--dry-run", action="store_true", help="check everything, list the points, run nothing")
    add("--only", nargs="+", action="extend", default=[], metavar="POINT", help="these points only")
    add("--only-index", type=int, metavar="I", help="the point of this number, as --dry-run lists")
    add(
        "--slurm",
        action="store_true",
        help="submit an array to Slurm, one task a point; with --dry-run only print its script",
    )
    add("--profile", metavar="NAME|FILE", help="the cluster, as `ttt-megatron submit` has it")


def run(args: argparse.Namespace) -> int:
    """Runs the points; raises UserError for whatever the user can fix."""
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: give 1 or more")
    from ttt_megatron.sweeps.points import find_points, make_points
    from ttt_megatron.sweeps.sweep_file import read_sweep

    sweep = read_sweep(args.sweep)
    output = Path(args.output or sweep.output)
    # --only takes what follows it; a point's name has no `=`.
    overrides = [*args.overrides, *(word for word in args.only if "=" in word)]
    names = [word for word in args.only if "=" not in word]
    points = make_points(sweep, output, overrides)
    chosen = find_points(points, names, args.only_index)
    sweep = with_asked(sweep)
    # torch takes seconds to import: not before the file is known to be good.
    from ttt_megatron.sweeps.state import resolve_points

    points = resolve_points(points, sweep)
    if args.slurm:
        return _submit_array(sweep, points, chosen, output, args, overrides)
    if args.dry_run:
        return _list(sweep, points, {point.name for point in chosen}, output)
    from ttt_megatron.sweeps.run import run_sweep

    return _tell(run_sweep(sweep, points, chosen, output, args.jobs or 1), output)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def with_asked(sweep: "Sweep") -> "Sweep":
    """The sweep, knowing what it asks of each task of its evaluation, defaults in place.

    Raises UserError if `ttt-megatron evaluate` does not have what the sweep asks of it.
    """
    if sweep.evaluate is None:
        return sweep
    import difflib
    from dataclasses import replace

    from ttt_megatron.cli import evaluate
    from ttt_megatron.sweeps.job import evaluate_words

    parser = _Parser(add_help=False, allow_abbrev=False)
    evaluate.add_arguments(parser)
    options = [word[2:] for action in parser._actions for word in action.option_strings]
    for name in sweep.evaluate:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{sweep.source}: measure.evaluate: unknown key {name}; the nearest known key is "
                f"{near} (`ttt-megatron evaluate --help` lists all)"
            )
    try:
        args = parser.parse_args(["MODEL", *evaluate_words(sweep.evaluate)])
    except UserError as error:
        raise UserError(f"{sweep.source}: measure.evaluate: {error}") from None
    tasks = args.task or [evaluate.DEFAULT_TASK]
    return replace(sweep, asked={task: evaluate.asked_options(args, task) for task in tasks})


def _list(sweep: "Sweep", points: "list[Point]", chosen: set[str], output: Path) -> int:
    from ttt_megatron.sweeps.run import read_states
    from ttt_megatron.sweeps.tables import plan_table

    shown = [point for point in points if point.name in chosen]
    _print(plan_table(shown, read_states(shown, sweep), f"{sweep.name} in {output}"))
    steps = sum(point.config.training.steps for point in shown)
    print(f"{len(shown)} points, {steps:,} steps in all")
    return 0


def _submit_array(
    sweep: "Sweep",
    points: "list[Point]",
    chosen: "list[Point]",
    output: Path,
    args: argparse.Namespace,
    overrides: list[str],
) -> int:
    from ttt_megatron.cluster.profile import load_profile
    from ttt_megatron.cluster.records import FOLDER
    from ttt_megatron.cluster.slurm import run_slurm
    from ttt_megatron.sweeps.slurm import array_script, submit_array
    from ttt_megatron.sweeps.tracking import track_points

    profile = load_profile(args.profile)
    text = array_script(sweep, chosen, output, args.jobs, overrides, profile)
    if args.dry_run:
        first, rest = text.split("\n", 1)
        print(first)
        print(f"# {shlex.join(['mkdir', '-p', str(output.absolute() / FOLDER)])}")
        print("# sbatch SCRIPT")
        print(rest, end="")
        return 0
    run_slurm(["sbatch", "--version"])
    # The tasks find the sweep's MLflow run here, rather than each looking for one.
    track_points(points, sweep, output)
    record = submit_array(text, sweep, chosen, output, profile)
    print(f"job {record.job_id}: {len(chosen)} tasks")
    print(f"next    ttt-megatron status --root {output}")
    print("then, for the table:")
    print(f"  ttt-megatron sweep {sweep.source} {' '.join([f'--output {output}', *overrides])}")
    return 0


def _print(table: object) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(table, Table)
    # Numbers cut short would be of no use: a narrow terminal wraps the lines instead.
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)


def _tell(end: "SweepEnd", output: Path) -> int:
    from ttt_megatron.sweeps.tables import LEGEND, terminal_table, unfinished

    if end.tracked is not None:
        print(f"MLflow      {end.tracked}")
    _print(terminal_table(end.results))
    print(LEGEND)
    for line in unfinished(end.results):
        print(line)
    for path in end.files:
        print(path)
    for name, failure in end.failures.items():
        print(f"FAILED: {name}, {failure.reason}; its log ends", file=sys.stderr)
        for line in failure.last_lines:
            print(f"    {line}", file=sys.stderr)
    if end.stop_signal is not None:
        print("interrupted; the same command goes on", file=sys.stderr)
        return EXIT_SIGNAL_BASE + end.stop_signal
    return EXIT_FAILED if end.failures else 0
