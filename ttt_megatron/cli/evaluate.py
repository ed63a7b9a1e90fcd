"""`ttt-megatron evaluate`: held-out losses and retrieval, inner steps on and off."""

import argparse
from typing import Any

from ttt_megatron.cli import (
    evaluate_context,
    evaluate_decode,
    evaluate_leakage,
    evaluate_needle,
    evaluate_position,
)
from ttt_megatron.cli.evaluate_models import load_evaluated
from ttt_megatron.cli.loaded_model import add_model_arguments
from ttt_megatron.errors import UserError

NAME = "evaluate"
HELP = "Measure held-out loss by token position, context length and more, inner steps on and off."
EPILOG = """examples:
  ttt-megatron evaluate runs/demo
  ttt-megatron evaluate runs/demo --length 32768 --documents 100 --batch 1
  ttt-megatron evaluate runs/demo --control runs/plain --data data/other --output results
  ttt-megatron evaluate runs/demo --task context --last 1024 --reference runs/full
  ttt-megatron evaluate runs/demo --task needle --lengths 1024,4096 --score choice
  ttt-megatron evaluate runs/demo --task decode --judge exported/large --prefill 2048
  ttt-megatron evaluate runs/demo --task position --task leakage

tasks:
  position  loss by token position; each document is read from its start
  context   loss of the same last tokens under growing context
  needle    S-NIAH-1, 2 and 3: a value hidden in a text, asked for at its end
  decode    another model's loss of what this one decodes
  leakage   whether losses depend on later tokens or other documents, and on the context's content

Each prints a table and writes JSON, Markdown and PNG (position: by_position.*). Fast weights are
fresh for every document. Standard errors are over documents, differences paired by document."""

_TASKS = {
    "position": evaluate_position,
    "context": evaluate_context,
    "needle": evaluate_needle,
    "decode": evaluate_decode,
    "leakage": evaluate_leakage,
}
DEFAULT_TASK = "position"
# Options that several tasks share, and whose; each task names its own.
_SHARED = {"last": ("context", "leakage"), "seed": ("needle", "decode")}
# Options that the numbers of every task depend on.
_COMMON = ("data", "control", "reference", "length", "documents")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--task",
        action="append",
        choices=list(_TASKS),
        help="what to measure, once or more often (default: position)",
    )
    add("--data", metavar="DIR", help="prepared data with a held-out part (default: the run's)")
    add("--control", metavar="CHECKPOINT_OR_RUN", help="another model to compare with")
    add(
        "--reference",
        metavar="MODEL",
        help="a model of the same tokenizer; by context, differences are to it",
    )
    add(
        "--length",
        type=int,
        metavar="N",
        help="positions read of each document, which must be longer; 0, for position, reads all "
        "documents whole (default: the run's sequence length)",
    )
    add(
        "--documents",
        type=int,
        default=64,
        metavar="N",
        help="documents at most, chosen at random but always the same; 0 is all "
        "(default: %(default)s)",
    )
    add("--batch", type=int, metavar="N", help="documents at once (default: the run's micro batch)")
    add(
        "--output", metavar="DIR", help="folder to write (default: evaluation/ in the run's folder)"
    )
    add(
        "--last",
        type=int,
        metavar="N",
        help="tokens measured at the end, by context and leakage (default: 128, or half of "
        "--length)",
    )
    add("--seed", type=int, metavar="N", help="of needles and decoding (default: 0)")
    for name in ("context", "needle", "decode"):
        _TASKS[name].add_arguments(parser.add_argument_group(f"--task {name}"))


def asked_options(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """What was asked of a task, as far as its numbers depend on it; None where nothing was said.

    Evaluations of one model and one set of data that were asked the same have the same numbers.
    """
    own = [option for option, whose in _owners().items() if task in whose]
    return {option: getattr(args, option) for option in (*_COMMON, *own)}


def run(args: argparse.Namespace) -> int:
    """Evaluates; raises UserError for whatever the user can fix."""
    tasks = list(dict.fromkeys(args.task or [DEFAULT_TASK]))
    for name, least in (("length", 0), ("documents", 0), ("batch", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: give {least} or more")
    _refuse_options_of_other_tasks(args, tasks)
    if "decode" in tasks:
        evaluate_decode.check(args)
    asked = {task: asked_options(args, task) for task in tasks}
    args.seed = args.seed or 0
    evaluated = load_evaluated(args, asked)
    for name in tasks:
        _TASKS[name].run(evaluated, args)
    return 0


def _refuse_options_of_other_tasks(args: argparse.Namespace, tasks: list[str]) -> None:
    """An option that nothing reads is a mistake."""
    for option, whose in _owners().items():
        value = getattr(args, option)
        if value is not None and not set(whose) & set(tasks):
            word = option.replace("_", "-")
            raise UserError(f"--{word} {value} belongs to --task {' or '.join(whose)}: add that")


def _owners() -> dict[str, tuple[str, ...]]:
    """The tasks that read each option that not all read."""
    owners: dict[str, tuple[str, ...]] = dict(_SHARED)
    for name, task in _TASKS.items():
        owners |= dict.fromkeys(task.OPTIONS, (name,))
    return owners
