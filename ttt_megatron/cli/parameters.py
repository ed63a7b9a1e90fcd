"""`ttt-megatron parameters`: count the parameters of recipes' models."""

import argparse
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ttt_megatron.config import load_recipe
from ttt_megatron.config.schema import ATTENTION_MIXERS, RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.model.parameters import ParameterCounts, count_parameters

NAME = "parameters"
HELP = "Count a model's parameters, by group."
EPILOG = """examples:
  ttt-megatron parameters                                    all sizes of recipes/
  ttt-megatron parameters recipes/125m/base.yaml
  ttt-megatron parameters my.yaml model.vocab_size=4096 model.num_suffix_layers=2

`fast` are the prime MLPs' matrices, which inner steps move."""

_PUBLISHED = "*/pretrain-e2e-8k.yaml"
_GROUPS = ("embedding", "head", "blocks", "prime", "norms", "total")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE | key=value",
        help="recipes, and settings that replace theirs (default: all sizes of recipes/)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints a row a recipe; raises UserError for a recipe that cannot be read."""
    overrides = [word for word in args.recipes if "=" in word]
    named = [Path(word) for word in args.recipes if "=" not in word]
    recipes = {str(path): path for path in named} or _published_recipes()
    counts = {name: _count(load_recipe(path, overrides), name) for name, path in recipes.items()}
    rows = sorted(counts.items(), key=lambda row: 0 if named else row[1].total)
    table = _table(rows)
    # Numbers cut short would be of no use: a narrow terminal wraps the lines instead.
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)
    return 0


def _published_recipes() -> dict[str, Path]:
    """The shapes in `recipes/` of a source checkout, or of the current folder."""
    beside_package = Path(__file__).resolve().parents[2] / "recipes"
    for folder in (beside_package, Path.cwd() / "recipes"):
        found = {path.parent.name: path for path in folder.glob(_PUBLISHED)}
        if found:
            return found
    raise UserError(
        f"there is no {beside_package / _PUBLISHED} and no recipes/{_PUBLISHED} here: name a recipe"
    )


def _count(config: RunConfig, name: str) -> ParameterCounts:
    if config.model.vocab_size is None:
        raise UserError(f"{name}: model.vocab_size is not set; add model.vocab_size=NUMBER")
    if set(config.model.mixer_kinds) <= set(ATTENTION_MIXERS):
        return count_parameters(config.model)
    # These bring torch in.
    from ttt_megatron.baselines.counts import count_with_mixers

    return count_with_mixers(config.model)


def _table(rows: list[tuple[str, ParameterCounts]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for group in _GROUPS:
        table.add_column("fast" if group == "prime" else group, justify="right", no_wrap=True)
    table.add_column("fast share", justify="right", no_wrap=True)
    for name, counts in rows:
        numbers = [f"{getattr(counts, group):,}" for group in _GROUPS]
        table.add_row(name, *numbers, f"{counts.prime / counts.total:.1%}")
    return table
