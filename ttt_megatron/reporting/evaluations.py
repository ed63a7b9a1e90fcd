"""Runs' evaluations, read from their folders, and what makes those that are lacking."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_megatron.errors import UserError
from ttt_megatron.reporting.runs import Group, ReportedRun, Subjects
from ttt_megatron.sweeps.state import POSITION, evaluation_file
from ttt_megatron.training.checkpoint_folder import RECIPE

TITLES = {
    POSITION: "loss by position",
    "context": "loss by context length",
    "needle": "needles in haystacks",
    "decode": "decoded text under a judge",
    "leakage": "checks for leakage",
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One task's results of one run, as its JSON has them."""

    run: ReportedRun
    path: Path
    values: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """What was evaluated."""
        found: dict[str, Any] = self.values["about"]
        return found


def read_evaluation(run: ReportedRun, task: str) -> Evaluation | None:
    """A task's results; None if it was not evaluated.

    Raises UserError if the file is none of `ttt-megatron evaluate`, or of an earlier step.
    """
    path = evaluation_file(run.folder, task)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        step = values["about"]["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no result of `ttt-megatron evaluate` ({error}): evaluate again"
        ) from None
    if step != run.step:
        raise UserError(
            f"{path} is of step {step}, and the newest checkpoint of step {run.step}: run "
            f"`{command(run, task)}` again"
        )
    return Evaluation(run=run, path=path, values=values)


def group_evaluations(group: Group, task: str) -> list[Evaluation]:
    """A task's results of those of a group's seeds that were evaluated. Raises as above."""
    return [found for run in group.runs if (found := read_evaluation(run, task)) is not None]


def common_ways(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ways of reading that all have, in the first one's order; none of nothing."""
    return [way for way in each[0] if all(way in ways for ways in each)] if each else []


def command(run: ReportedRun, task: str) -> str:
    """What evaluates a run on a task."""
    folder = shlex.quote(str(run.folder))
    options = "" if task == POSITION else f" --task {task}"
    judge = " --judge MODEL" if task == "decode" else ""
    return f"ttt-megatron evaluate {folder}{options}{judge}"


def refuse_unevaluated(subjects: Subjects) -> None:
    """Raises UserError if nothing was measured of any run."""
    if subjects.sweeps or subjects.benches:
        return
    files = [evaluation_file(run.folder, task) for run in subjects.runs for task in TITLES]
    if not any(path.is_file() for path in files):
        run = subjects.runs[0]
        raise UserError(
            f"{run.folder} has not been evaluated: run `{command(run, POSITION)}` first"
        )


def refuse_unevaluated_reference(group: Group) -> None:
    """Raises UserError if none of a group's runs has losses that others can be compared with."""
    tasks = (POSITION, "context")
    if not any(evaluation_file(run.folder, t).is_file() for run in group.runs for t in tasks):
        run = group.runs[0]
        raise UserError(
            f"--reference {run.folder} has not been evaluated: run `{command(run, POSITION)}` first"
        )


def lacking(subjects: Subjects) -> str:
    """What is not measured of which runs, with the commands that do so, in Markdown."""
    parts = []
    for task, title in TITLES.items():
        runs = [run for run in subjects.runs if not evaluation_file(run.folder, task).is_file()]
        if runs:
            lines = "\n".join(command(run, task) for run in runs)
            parts.append(f"{_names(runs)} without {title}:\n\n```\n{lines}\n```\n")
    if subjects.runs and not subjects.benches:
        run = subjects.runs[0]
        words = ["ttt-megatron", "bench", "--only", "latency"]
        words += ["--recipe", str(run.checkpoint / RECIPE), "--output", str(run.folder / "bench")]
        parts.append(f"No latencies, as of {run.label}:\n\n```\n{shlex.join(words)}\n```\n")
    return "\n".join(parts)


def _names(runs: list[ReportedRun]) -> str:
    return f"{len(runs)} runs" if len(runs) > 3 else ", ".join(run.label for run in runs)
