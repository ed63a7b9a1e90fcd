"""`ttt-megatron submit`: train a recipe, or several one after the other, as jobs of Slurm."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.cluster.profile import Profile
    from ttt_megatron.cluster.submission import Stage

NAME = "submit"
HELP = "Train recipes as jobs of a Slurm cluster, stage after stage."
EPILOG = """examples:
  ttt-megatron submit recipes/3b/pretrain-e2e-8k.yaml --nodes 16
  ttt-megatron submit recipes/3b/pretrain-e2e-8k.yaml --nodes 16 --profile site.yaml --dry-run
  ttt-megatron submit recipes/3b/pretrain-e2e-8k.yaml data.path=/data/pretrain --nodes 16 \\
      --then recipes/3b/extend-e2e-32k.yaml data.path=/data/extend
  ttt-megatron submit recipes/3b/extend-e2e-32k.yaml --nodes 16 --after 4711

Everything is checked first: the recipe with its layout on nodes x GPUs, its data, what it starts
from. Sizes under `parallel` are taken at their word; without any the layout is planned. Each job is
recorded in jobs.jsonl beside the run's folder. A job saves and queues itself again at its time
limit, when preempted and after failures, until the run is finished. docs/cluster.md has the
profiles, what is tried again, and what to do when something went wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a YAML recipe")
    add("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    add("--nodes", type=int, metavar="N", help="nodes of every job (default: as few as it needs)")
    add(
        "--profile",
        metavar="NAME|FILE",
        help="the cluster (default: TTT_MEGATRON_PROFILE, else `default`)",
    )
    add(
        "--after",
        nargs="+",
        action="extend",
        default=[],
        metavar="JOB",
        help="begin when these jobs have succeeded",
    )
    add(
        "--then",
        nargs="+",
        action="append",
        default=[],
        metavar=("RECIPE", "key=value"),
        help="a next stage, from the weights of the one before; with settings of its own",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the scripts, submit nothing; what would be refused here is a warning",
    )


def run(args: argparse.Namespace) -> int:
    """Submits; raises UserError for whatever the user can fix."""
    from ttt_megatron.cluster.profile import load_profile
    from ttt_megatron.cluster.submission import make_stages, submit_stages

    profile = load_profile(args.profile)
    # --after takes what follows it; a job's id has no `=`.
    overrides = [*args.overrides, *(word for word in args.after if "=" in word)]
    after = [word for word in args.after if "=" not in word]
    for job in after:
        if not job.replace("_", "", 1).isdigit():
            raise UserError(f"--after {job}: give the number of a job, as `submit` printed it")
    chain = [(args.recipe, overrides), *((then[0], then[1:]) for then in args.then)]
    stages = make_stages(chain, args.nodes, profile)
    if args.dry_run:
        _show(stages, profile, after)
        return 0
    from ttt_megatron.cluster.starts import jobs_to_wait_for

    for one in stages:
        _check_data(one, profile)
    records = submit_stages(stages, profile, jobs_to_wait_for(stages, after))
    for stage, record in zip(stages, records, strict=True):
        waits = f" after {', '.join(record.after)}" if record.after else ""
        parallel = stage.config.parallel
        print(
            f"job {record.job_id}{waits}: {record.name} on {record.nodes} x {record.processes} "
            f"processes, tensor {parallel.tensor}, context {parallel.context}, pipeline "
            f"{parallel.pipeline}, data {parallel.data} ({stage.placement.origin})"
        )
        print(f"    log  {record.log}")
    root = _shown(stages[0].output.parent)
    print(f"next    ttt-megatron status --root {root}")
    print(f"        ttt-megatron logs --root {root} {records[0].job_id} --follow")
    return 0


def _show(stages: "list[Stage]", profile: "Profile", after: list[str]) -> None:
    """Prints the scripts, each with the commands that submit it below its first line.

    What `submit` would refuse is a warning: data and other jobs may be on the cluster alone.
    """
    from ttt_megatron.cluster.starts import jobs_to_wait_for
    from ttt_megatron.cluster.submission import script_of, submission_lines

    for stage in stages:
        with _warning():
            _check_data(stage, profile)
    with _warning():
        after = jobs_to_wait_for(stages, after)
    for number, stage in enumerate(stages, 1):
        before = [f"JOB_OF_STAGE_{number - 1}"] if number > 1 else after
        # What does not begin with `#!` is no script to sbatch.
        first, rest = script_of(stage, profile).split("\n", 1)
        print(first)
        print(f"# ---- stage {number} of {len(stages)}:")
        for line in submission_lines(stage, before):
            print(f"# {line}")
        print(rest, end="")


@contextmanager
def _warning() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(f"warning: from here it would not be submitted: {error}", file=sys.stderr)


def _shown(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _check_data(stage: "Stage", profile: "Profile") -> None:
    """Raises UserError for data that is not there; what only a container sees is not looked for."""
    data = stage.config.data
    if not data.path:
        raise UserError(
            f"{stage.recipe}: data.path is empty: give the folder that `ttt-megatron prepare` wrote"
        )
    if profile.container is not None and not Path(data.path).exists():
        return
    from ttt_megatron.data.dataset import open_dataset
    from ttt_megatron.data.stream import TokenStream

    TokenStream(open_dataset(data.path), data.sequence_length, data.packing, data.seed)
