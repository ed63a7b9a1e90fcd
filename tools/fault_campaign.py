"""Hurt many small trainings of four processes, each in its way, and see that all end the same.

    python tools/fault_campaign.py --runs 60 --table docs/reliability-table.md
    python tools/fault_campaign.py --runs 4 --only "rank killed" --seed 7
    python tools/fault_campaign.py --runs 11 --without "disk full for a while"

First every layout is trained undisturbed. Then each run is hurt at a random moment: processes are
killed, stopped and signalled, checkpoints damaged, the disk filled, the MLflow server killed. The
run starts itself again (`train --max-restarts`); where all of it is gone, the same command is given
once more. At its end parameters and every step's loss must be bitwise those of the undisturbed run,
with no step lost beyond the last complete checkpoint, no process left and no unfinished file.
Exits with status 1 if any run is otherwise; its folder then stays.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from campaign_faults import FAULTS, NEEDS_DISK, NEEDS_SERVER, mount_small, start_server
from campaign_run import LAYOUTS, RECIPE, SAVE_INTERVAL, STEPS, CampaignError, Run

from ttt_megatron.data.prepare import PrepareOptions, prepare

_MOST_STARTS = 4


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run: None in `wrong` if all is as it must be."""

    kind: str
    layout: str
    what: str
    wrong: str | None
    starts: int = 0
    restarts: int = 0
    redone: int = 0
    seconds: float | None = None
    """From the fault to the run's next beginning; None where it did not end."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The undisturbed run of a layout."""

    losses: dict[int, float]
    weights: dict[str, torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign; the exit status."""
    options = _options(arguments)
    kinds = [k for k in FAULTS if k not in options.without and options.only in (None, k)]
    folder = Path(tempfile.mkdtemp(prefix="fault-campaign-"))
    recipe = _prepare(folder)
    chance = random.Random(options.seed)
    print(f"{options.runs} runs in {folder}; seed {options.seed}", flush=True)
    references = {}
    for layout in list(LAYOUTS)[: options.runs]:
        references[layout] = _undisturbed(recipe, folder, layout)
        print(f"undisturbed, {layout}: {STEPS} steps", flush=True)
    outcomes: list[Outcome] = []
    began = time.monotonic()
    for number in range(options.runs):
        kind = kinds[number % len(kinds)]
        layout = list(references)[number // len(kinds) % len(references)]
        outcome = _one(recipe, folder / f"{number:03d}", kind, layout, references[layout], chance)
        outcomes.append(outcome)
        left = (time.monotonic() - began) / len(outcomes) * (options.runs - len(outcomes))
        print(f"{number + 1}/{options.runs}  {_line(outcome)}  ETA {left / 60:.0f} min", flush=True)
    table = _table(outcomes)
    print(table)
    if options.table is not None:
        options.table.write_text(table, encoding="utf-8")
    if any(outcome.wrong for outcome in outcomes):
        print(f"what went wrong is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(FAULTS), help="this fault alone")
    parser.add_argument("--without", choices=list(FAULTS), action="append", default=[])
    parser.add_argument("--table", type=Path, help="a Markdown file for the table")
    return parser.parse_args(arguments)


def _prepare(folder: Path) -> Path:
    words = random.Random(3).choices(("sea", "whale", "ship", "harpoon", "night"), k=20_000)
    (folder / "text.txt").write_text(" ".join(words))
    prepare(
        PrepareOptions(
            inputs=(str(folder / "text.txt"),), output=str(folder / "data"), validation=0, workers=1
        )
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return recipe


def _run(recipe: Path, output: Path, layout: str, *more: str) -> Run:
    data = f"data.path={recipe.parent / 'data'}"
    return Run(recipe=recipe, output=output, overrides=(data, *LAYOUTS[layout], *more))


def _undisturbed(recipe: Path, folder: Path, layout: str) -> Reference:
    run = _run(recipe, folder / "undisturbed", layout)
    run.start()
    if run.wait() != 0:
        raise CampaignError(f"the undisturbed run failed: see {run.log}")
    reference = Reference(losses=run.losses(), weights=run.weights())
    run.clear()
    return reference


def _one(
    recipe: Path, folder: Path, kind: str, layout: str, reference: Reference, chance: random.Random
) -> Outcome:
    """One run from its start to its judgement."""
    folder.mkdir()
    more = [f"training.async_save={str(chance.random() < 0.5).lower()}"]
    disk = kind == NEEDS_DISK
    run = None
    try:
        if disk:
            mount_small(folder / "disk")
        run = _run(recipe, (folder / "disk" if disk else folder) / "run", layout, *more)
        if kind == NEEDS_SERVER:
            run.server, address = start_server(folder / "server")
            run.environment["MLFLOW_TRACKING_URI"] = address
            run.overrides += ("tracking.mlflow=true",)
        return _hurt(run, kind, layout, reference, chance)
    except CampaignError as error:
        return Outcome(kind=kind, layout=layout, what="", wrong=str(error))
    finally:
        if run is not None and run.server is not None and run.server.poll() is None:
            os.killpg(run.server.pid, signal.SIGKILL)
        if disk:
            # Lazily: logs of a process that is just ending may still be open.
            os.system(f"umount -l '{folder / 'disk'}'")


def _hurt(run: Run, kind: str, layout: str, reference: Reference, chance: random.Random) -> Outcome:
    run.start()
    what = FAULTS[kind](run, chance)
    hurt, step = time.time(), run.step
    saved = run.saved
    status = run.wait()
    while status != 0 and run.starts < _MOST_STARTS:
        run.start()
        status = run.wait()
    events = [event for event in run.events() if event.time > hurt]
    again = [event for event in events if event.kind in ("resumed", "started")]
    went_on = again[0].step or 0 if again else step
    wrong = None if status == 0 else f"ended with status {status}: see {run.log}"
    wrong = wrong or _judge(run, reference, min(saved, step), went_on)
    if wrong is None:
        run.clear()
    return Outcome(
        kind=kind,
        layout=layout,
        what=what,
        wrong=wrong,
        starts=run.starts,
        restarts=sum("starting again" in event.message for event in events),
        redone=max(step - went_on, 0),
        seconds=again[0].time - hurt if again else None,
    )


def _judge(run: Run, reference: Reference, saved: int, went_on: int) -> str | None:
    """What is not as it must be at the end of a run."""
    left = run.processes()
    if left:
        return f"processes {[process.pid for process in left]} are left"
    if went_on < saved:
        return f"went on from step {went_on}, though step {saved} was complete"
    if run.losses() != reference.losses:
        return "losses differ from the undisturbed run's"
    weights = run.weights()
    for name, value in reference.weights.items():
        if not torch.equal(weights[name], value):
            return f"{name} differs from the undisturbed run's"
    unfinished = [path.name for path in run.checkpoints.glob("*.tmp-*")]
    return f"left {unfinished}" if unfinished else None


def _line(outcome: Outcome) -> str:
    if outcome.wrong is not None:
        return f"{outcome.kind} ({outcome.what}), {outcome.layout}: WRONG: {outcome.wrong}"
    after = "" if outcome.seconds is None else f", on again after {outcome.seconds:.1f} s"
    return (
        f"{outcome.kind} ({outcome.what}), {outcome.layout}: bitwise equal, "
        f"{outcome.redone} steps redone{after}"
    )


def _table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes by kind of fault, as Markdown."""
    lines = [
        f"| fault | runs | as undisturbed | restarts by itself | starts by command | steps redone "
        f"(of {SAVE_INTERVAL} between checkpoints), mean, most | seconds until on again, mean, "
        f"most |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        seconds = [outcome.seconds for outcome in own if outcome.seconds is not None]
        times = f"{statistics.fmean(seconds):.1f}, {max(seconds):.1f}" if seconds else "none"
        redone = [outcome.redone for outcome in own]
        lines.append(
            f"| {kind} | {len(own)} | {sum(outcome.wrong is None for outcome in own)} "
            f"| {sum(outcome.restarts for outcome in own)} "
            f"| {sum(max(outcome.starts - 1, 0) for outcome in own)} "
            f"| {statistics.fmean(redone):.1f}, {max(redone)} | {times} |"
        )
    good = sum(outcome.wrong is None for outcome in outcomes)
    lines.append(f"| all | {len(outcomes)} | {good} | | | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CampaignError as error:
        sys.exit(f"error: {error}")
