"""`ttt-megatron plan`: memory, time and transfers of a run before it is started."""

import argparse
import json
from pathlib import Path
from typing import Any

from ttt_megatron.config import load_recipe
from ttt_megatron.errors import UserError
from ttt_megatron.planning.estimate import Estimator
from ttt_megatron.planning.hardware import NAMED, find_hardware
from ttt_megatron.planning.mixers import knows_mixers
from ttt_megatron.planning.picture import draw_timeline
from ttt_megatron.planning.report import as_json, heading, overrides, tables
from ttt_megatron.planning.search import Plan, make_plan

NAME = "plan"
HELP = "Estimate memory, time and transfers of a run, and find its best layouts."
EPILOG = f"""examples:
  ttt-megatron plan recipes/3b/extend-e2e-32k.yaml --gpus 64
  ttt-megatron plan recipes/3b/extend-e2e-32k.yaml --gpus 128 --json plan.json \\
      data.sequence_length=131072 training.global_batch_size=16
  ttt-megatron plan recipes/1b/pretrain-e2e-8k.yaml --gpus 16 --gpu a100-80 \\
      --hardware network_gbs=12.5 --hardware matmul_efficiency=0.5
  ttt-megatron plan recipes/3b/extend-e2e-32k.yaml --gpus 64 --png schedule.png

GPUs: {", ".join(NAMED)}. The recipe's own layout is shown with as many data-parallel replicas as
fill the GPUs. docs/planning.md says what is counted and what is assumed."""

_MOST_MICRO_BATCHES_DRAWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    parser.add_argument("--gpus", type=int, help="GPUs in all (default: the recipe's processes)")
    parser.add_argument("--gpu", default="h100", help="kind of GPU (default: h100)")
    parser.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="key=value",
        help="a figure of the GPU or an efficiency to assume; can be repeated",
    )
    parser.add_argument("--top", type=int, default=5, help="layouts to show (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="also draw the best layout's schedule"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the plan; raises UserError for what cannot be read, laid out, or held in memory."""
    for name in ("gpus", "top"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give a number of at least 1")
    hardware = find_hardware(args.gpu, args.hardware)
    for path in (args.json, args.png):
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.resolve().parent}; make it first")
    config = load_recipe(args.recipe, args.overrides)
    if not knows_mixers(config.model):
        raise UserError(
            f"{args.recipe}: model.mixers = {config.model.mixers}, and plans know models of "
            "windowed attention alone; plan the same shape with model.mixers=attention"
        )
    plan = make_plan(config, hardware, args.gpus, args.top)
    print(heading(plan))
    if plan.note:
        print(plan.note)
    for table in tables(plan):
        print(f"\n{table}")
    print("\nsettings\n" + "\n".join(overrides(plan)))
    if args.json:
        _write(args.json, as_json(plan))
    if args.png:
        _draw(plan, args.png)
    return 0


def _write(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def _draw(plan: Plan, path: Path) -> None:
    """The best layout that has ranks to schedule, or the best if none has."""
    scheduled = [e for e in plan.best if e.layout.context * e.layout.pipeline > 1]
    found = (scheduled or plan.best)[0]
    layout = found.layout
    wanted = max(_MOST_MICRO_BATCHES_DRAWN, 2 * layout.context, 2 * layout.pipeline)
    wanted -= wanted % layout.pipeline
    number = min(layout.micro_batches(plan.config), wanted)
    timeline = Estimator(plan.config, layout, plan.hardware).timeline(found.schedule, number)
    title = f"{layout}, {found.schedule}, {number} micro-batches, bubble {timeline.bubble:.2f}"
    draw_timeline(timeline, path, title, layout.context)
