"""`ttt-megatron config`: the resolved recipe, or the reference of all keys."""

import argparse

from ttt_megatron.config import describe, load_recipe, to_yaml
from ttt_megatron.errors import UserError

NAME = "config"
HELP = "Print a recipe, resolved, or the reference of keys."
EPILOG = """examples:
  ttt-megatron config recipes/125m/pretrain-e2e-8k.yaml
  ttt-megatron config recipes/125m/base.yaml optimizer.lr=1e-3 training.init_from=null
  ttt-megatron config --keys"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    parser.add_argument(
        "--keys", action="store_true", help="print every key with its default and meaning"
    )


def run(args: argparse.Namespace) -> int:
    """Prints what was asked for; raises UserError for a recipe that cannot be resolved."""
    if args.keys:
        print(describe(), end="")
        return 0
    if args.recipe is None:
        raise UserError("config needs a RECIPE to resolve, or --keys for the reference of keys.")
    print(to_yaml(load_recipe(args.recipe, args.overrides)), end="")
    return 0
