"""`ttt-megatron baselines`: recipes of the systems that a TTT-E2E recipe is compared with."""

import argparse
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ttt_megatron.config import load_recipe
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError

NAME = "baselines"
HELP = "Make recipes of the systems that a TTT-E2E recipe is compared with."
EPILOG = """examples:
  ttt-megatron baselines recipes/125m/pretrain-e2e-8k.yaml                     widths and parameters
  ttt-megatron baselines recipes/125m/pretrain-e2e-8k.yaml --output my-baselines
  ttt-megatron baselines my.yaml --systems swa,full,gated_delta --output my-baselines

All have the recipe's data, schedule and number of parameters; their MLPs make up for what their
mixers take. A file has its system's name in place of the recipe's e2e, as in pretrain-swa-8k.yaml,
or else as all of its name. A recipe that starts from another run starts from the same system's run:
make those of that stage too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    parser.add_argument("recipe", type=Path, help="a TTT-E2E recipe")
    parser.add_argument("--systems", metavar="A,B", help="which (default: all)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write recipes there")


def run(args: argparse.Namespace) -> int:
    """Prints a row a system; raises UserError for a recipe they cannot be made from."""
    from ttt_megatron.baselines.recipes import recipe_file, system_recipe
    from ttt_megatron.baselines.systems import SYSTEMS, as_system

    config = load_recipe(args.recipe)
    if config.model.vocab_size is None:
        raise UserError(f"{args.recipe}: model.vocab_size is not set; set it there")
    names = args.systems.split(",") if args.systems else list(SYSTEMS)
    made = {name: as_system(config, name, str(args.recipe)) for name in names}
    texts = {
        recipe_file(name, args.recipe): system_recipe(config, one, name, args.recipe, args.output)
        for name, one in made.items()
        if args.output is not None and name != "e2e"
    }
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: that is a file; give a folder")
    for file in texts:
        path = args.output / file
        if path.exists():
            raise UserError(f"{path}: there is such a file; give another folder, or remove it")
    console = Console()
    table = _table(config, made)
    console = Console(width=max(console.width, Console(width=1000).measure(table).maximum))
    console.print(table)
    for file, text in texts.items():
        args.output.mkdir(parents=True, exist_ok=True)
        beside = args.output / f".{file}.tmp"
        beside.write_text(text, encoding="utf-8")
        beside.replace(args.output / file)
    if texts:
        console.print(f"wrote {len(texts)} recipes to {args.output}", highlight=False)
    return 0


def _table(config: RunConfig, made: dict[str, RunConfig]) -> Table:
    from ttt_megatron.baselines.counts import count_with_mixers
    from ttt_megatron.baselines.systems import SYSTEMS
    from ttt_megatron.training.flops import model_flops_per_token

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("system", no_wrap=True)
    for title in ("MLP width", "parameters", "to the recipe's", "MFLOPs a token"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("what it is", no_wrap=True)
    wanted = count_with_mixers(config.model).total
    for name, one in made.items():
        total = count_with_mixers(one.model).total
        flops = model_flops_per_token(one.model, one.data.sequence_length) / 1e6
        table.add_row(
            name,
            f"{one.model.ffn_hidden_size:,}",
            f"{total:,}",
            f"{total / wanted - 1:+.2%}",
            f"{flops:,.1f}",
            SYSTEMS[name].text,
        )
    return table
