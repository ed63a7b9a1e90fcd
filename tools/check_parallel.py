"""Hold training under a layout of processes to training in one process, in float64.

A tiny model, as large as the layout needs (heads, blocks before the suffix, chunks, sequences),
evaluates a batch and takes three outer steps, with an inner learning rate of 0.7 (2.8 over the
number of chunks where there are more than four) and inner gradients clipped to 2.0: large steps,
since small ones would hide errors of second order. Compared are the losses and the other logged
figures of every step, every token's and chunk's loss, every sequence's fast weights after its last
chunk, all outer gradients, Adam's moments and the parameters after the steps, put together from
all processes. One process takes the whole batch at once, a layout micro-batches of one sequence.
Without a layout one process in micro-batches is held to one that takes the batch whole, which
shows how far rounding alone goes.

--golden compares with a golden file too: its weights and data under the same layout at the file's
own inner learning rate (1.0; B 0.46), its token and chunk losses, inner and outer gradient norms,
fast weights and meta-gradients, and where it has them losses and parameters of three outer steps.

An error is the largest difference within an array relative to its largest entry. The exit status
is 1 if one exceeds 1e-10, and 2 for a layout that no recipe can have.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from golden_course import GoldenCase
from parallel_course import Case, Course, Kind, courses, errors
from parallel_layouts import SCHEDULES, all_layouts, grown, layout

from ttt_megatron.config import ParallelConfig
from ttt_megatron.config.validate import validate
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.launcher import WorkerError, launch

BOUND = 1e-10
TITLES = {
    "loss": "losses of the steps",
    "logged": "other logged figures",
    "nll": "losses of tokens",
    "chunk losses": "losses of chunks",
    "fast": "fast weights",
    "gradient": "outer gradients",
    "moment": "Adam's moments",
    "parameter": "parameters",
}
EXAMPLES = """examples:
  %(prog)s --tensor 2 --context 2
  %(prog)s --tensor 2 --sequence-parallel --data 2 --overlap
  %(prog)s --pipeline 2 --schedule interleaved --micro-batches 4
  %(prog)s --context 2 --schedule zigzag --golden tests/golden/A.npz
  %(prog)s --all --golden tests/golden/A.npz
"""


@dataclass(frozen=True)
class Check:
    """A layout's errors by array, against one process and against the golden file."""

    name: str
    seconds: float
    alone: dict[str, float]
    golden: dict[str, float] | None

    @property
    def within(self) -> bool:
        """Whether nothing is beyond the bound."""
        return all(e <= BOUND for e in [*self.alone.values(), *(self.golden or {}).values()])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("tensor", "context", "pipeline", "data"):
        found.add_argument(f"--{name}", type=int, default=1, help=f"{name}-parallel processes")
    found.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="1f1b",
        help="order of the passes: zigzag of context parts, interleaved of pipeline stages",
    )
    found.add_argument("--sequence-parallel", action="store_true", help="share out tokens too")
    found.add_argument(
        "--overlap", action="store_true", help="reduce and gather while passes still run"
    )
    found.add_argument(
        "--micro-batches", type=int, help="micro-batches of a replica's step; of a golden file: all"
    )
    found.add_argument("--window", type=int, help="attention window of the tiny model, in tokens")
    found.add_argument("--golden", type=Path, metavar="FILE", help="golden .npz file")
    found.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="gloo on cpu, NCCL on cuda"
    )
    found.add_argument(
        "--all", action="store_true", help="every layout of a list, a line each; no other layout"
    )
    return found


def chosen(args: argparse.Namespace) -> dict[str, Kind]:
    """The cases the command line asks for, by name. Raises UserError for an impossible one."""
    if args.all:
        return all_layouts()
    sizes = [args.tensor, args.context, args.pipeline, args.data]
    parallel = layout(
        *sizes,
        schedule=args.schedule,
        sequence_parallel=args.sequence_parallel,
        overlap=args.overlap,
    )
    titles = ("TP", "CP", "PP", "DP")
    named = [f"{title}{size}" for title, size in zip(titles, sizes, strict=True) if size != 1]
    return {"x".join(named) or "1 process": grown(parallel, args.micro_batches, args.window)}


def golden_case(path: Path, kind: Kind) -> GoldenCase:
    """A golden file under a case's layout, in micro-batches of one sequence."""
    return GoldenCase(path=path, parallel=kind.parallel)


def refuse_impossible(case: Case, source: str) -> None:
    """Raises UserError for what a recipe's validation refuses, or training before it starts."""
    validate(case.config, source)
    vocabulary, parts = case.config.model.vocab_size, case.parallel.tensor
    assert vocabulary is not None
    if vocabulary % parts:
        raise UserError(
            f"{source}: parallel.tensor = {parts} does not divide model.vocab_size = {vocabulary}; "
            f"choose a number of processes that does."
        )


def check(kinds: dict[str, Kind], golden: Path | None = None, device: str = "cpu") -> list[Check]:
    """Errors of cases with equally many processes, in one launch.

    Raises UserError for an impossible layout, WorkerError where a process crashed.
    """
    together: list[Case] = []
    for name, kind in kinds.items():
        refuse_impossible(kind, name)
        together.append(kind)
        if golden is not None:
            case = golden_case(golden, kind)
            refuse_impossible(case, f"{golden} under {name}")
            together.append(case)
    size = together[0].parallel.world_size
    arguments = (together, device)
    found = courses(*arguments) if size == 1 else launch(courses, arguments, size)
    return _compared(kinds, found, golden, device)


def _compared(
    kinds: dict[str, Kind], found: list[tuple[Course, float]], golden: Path | None, device: str
) -> list[Check]:
    results = iter(found)
    checks = []
    whole = [replace(k, parallel=ParallelConfig(), micro=k.sequences) for k in kinds.values()]
    for (name, kind), (alone, _) in zip(kinds.items(), courses(whole, device), strict=True):
        course, seconds = next(results)
        to_golden = None
        if golden is not None:
            expected = golden_case(golden, kind).expected()
            under_layout, more = next(results)
            to_golden = errors({n: under_layout[n] for n in expected}, expected)
            seconds += more
        checks.append(Check(name, seconds, errors(course, alone), to_golden))
    return checks


def worst_by_quantity(found: dict[str, float]) -> dict[str, tuple[float, str]]:
    """Per quantity the largest error and its array's name."""
    worst: dict[str, tuple[float, str]] = {}
    for name, error in found.items():
        quantity, _, array = name.partition("/")
        worst[quantity] = max(worst.get(quantity, (-1.0, "")), (error, array))
    return {quantity: worst[quantity] for quantity in TITLES if quantity in worst}


def table(title: str, found: dict[str, float]) -> str:
    """A row a quantity: the worst error and where."""
    lines = [f"\n{title}"]
    for quantity, (error, array) in worst_by_quantity(found).items():
        beyond = "" if error <= BOUND else "  BEYOND THE BOUND"
        lines.append(f"  {TITLES[quantity]:22s}{error:9.1e}  {array}{beyond}")
    return "\n".join(lines)


def line(one: Check) -> str:
    """A layout in one line: the worst error, where, that to the golden file, and seconds."""
    cells = [f"{one.name:24s}"]
    for found in (one.alone, one.golden):
        if found is not None:
            error, name = max((error, name) for name, error in found.items())
            cells.append(f"{error:8.1e}  {name.split('/')[0]:14s}")
    return "".join([*cells, f"{one.seconds:6.1f}", "" if one.within else "  BEYOND THE BOUND"])


def report(args: argparse.Namespace) -> bool:
    """Runs and prints what is asked for; returns whether all is within the bound."""
    kinds, within = chosen(args), True
    if args.all:
        against = ["against one process", *(["against the file"] if args.golden else [])]
        print(f"{'layout':24s}" + "".join(f"{title:24s}" for title in against) + "seconds")
    for size, group in groupby(kinds.items(), key=lambda item: item[1].parallel.world_size):
        for one in check(dict(group), args.golden, args.device):
            within &= one.within
            if args.all:
                print(line(one), flush=True)
                continue
            print(f"{one.name}: {size} of {args.device}, {one.seconds:.1f} s, bound {BOUND:g}")
            print(table("against one process", one.alone))
            if one.golden is not None:
                print(table(f"against {args.golden}", one.golden))
    return within


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parser().parse_args(arguments)
    try:
        within = report(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\nall within the bound" if within else "\nbeyond the bound")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
