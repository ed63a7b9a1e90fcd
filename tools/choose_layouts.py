"""Choose the layouts of published recipes: `layouts.yaml` beside the recipes of every size.

    python tools/choose_layouts.py                      # all sizes that have none yet
    python tools/choose_layouts.py 125m 3b              # these, anew
    python tools/choose_layouts.py 3b --recipes 'extend-full-*'   # some recipes; the rest stays

For every recipe, on 8, 32 and 128 H100s, in bf16 and fp8: the fastest layout that fits by
`ttt-megatron plan`, with its seconds a step and memory, or why there is none. A size takes minutes
and is written when it is done.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ttt_megatron.config import load_recipe
from ttt_megatron.config.layouts import (
    LAYOUTS_FILE,
    ChosenLayout,
    Layouts,
    LayoutsFile,
    read_layouts,
    shapes_of,
    write_layouts,
)
from ttt_megatron.errors import UserError
from ttt_megatron.planning.choice import choose_layout
from ttt_megatron.planning.hardware import GIB, Hardware, find_hardware

RECIPES = Path(__file__).parents[1] / "recipes"
GPU = "h100"
GPUS = (8, 32, 128)
PRECISIONS = ("bf16", "fp8")
HEADING = """\
The fastest layouts that fit on so many GPUs, by tools/choose_layouts.py: seconds of a step and GiB
of the fullest GPU are the planner's. `ttt-megatron train RECIPE SETTINGS` takes one."""


def published(size: str) -> list[Path]:
    """A size's recipes, shortest sequences first."""
    found = (RECIPES / size).glob("*-*-*k.yaml")
    return sorted(found, key=lambda path: (int(path.stem.split("-")[-1][:-1]), path.stem))


def sizes() -> list[str]:
    """The published sizes, smallest first."""
    order = ("125m", "350m", "760m", "1b", "3b", "8b")
    return [size for size in order if (RECIPES / size / "base.yaml").is_file()]


def choose(recipe: Path, gpus: int, precision: str, hardware: Hardware) -> ChosenLayout:
    """One recipe's layout, or the reason why there is none."""
    config = load_recipe(recipe, [f"training.precision={precision}"])
    try:
        choice = choose_layout(config, hardware, gpus)
    except UserError as error:
        return ChosenLayout(recipe=recipe.stem, gpus=gpus, precision=precision, unfit=str(error))
    estimate, planned = choice.estimate, choice.note is None
    return ChosenLayout(
        recipe=recipe.stem,
        gpus=gpus,
        precision=precision,
        settings=" ".join(estimate.layout.overrides()),
        schedule=estimate.schedule if planned else None,
        step_seconds=float(f"{estimate.step_seconds:.4g}") if planned else None,
        memory_gib=round(estimate.chosen.memory_bytes / GIB, 2) if planned else None,
        note=choice.note,
    )


def chosen(recipes: Sequence[Path], hardware: Hardware) -> Iterator[ChosenLayout]:
    """All recipes' layouts, told of as they come."""
    for recipe in recipes:
        for gpus in GPUS:
            for precision in PRECISIONS:
                found = choose(recipe, gpus, precision, hardware)
                told = found.settings or found.unfit
                print(f"{recipe.parent.name}/{recipe.stem} {gpus} {precision}: {told}", flush=True)
                yield found


def update(size: str, pattern: str, hardware: Hardware) -> Path:
    """Writes a size's file: the recipes of the pattern anew, others as they were."""
    path, recipes = RECIPES / size / LAYOUTS_FILE, published(size)
    names = [recipe.stem for recipe in recipes]
    old = read_layouts(path) if path.is_file() else LayoutsFile(gpu=GPU, layouts={})
    wanted = [recipe for recipe in recipes if recipe.match(f"{pattern}.yaml")]
    new: Layouts = {(one.recipe, one.gpus, one.precision): one for one in chosen(wanted, hardware)}
    entries = {key: one for key, one in (old.layouts | new).items() if key[0] in names}
    ordered = dict(
        sorted(entries.items(), key=lambda item: (names.index(item[0][0]), *item[0][1:]))
    )
    shapes = old.shapes | {recipe.stem: shapes_of(load_recipe(recipe)) for recipe in wanted}
    shapes = {name: shapes[name] for name in names if name in shapes}
    write_layouts(path, HEADING, LayoutsFile(gpu=GPU, layouts=ordered, shapes=shapes))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Chooses and writes; 2 for a size that there is not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="folders of recipes/")
    parser.add_argument("--recipes", default="*", metavar="PATTERN", help="of their names")
    args = parser.parse_args(argv)
    for size in args.sizes:
        if size not in sizes():
            print(f"error: {size} is no size; they are {', '.join(sizes())}", file=sys.stderr)
            return 2
    todo = args.sizes or [s for s in sizes() if not (RECIPES / s / LAYOUTS_FILE).is_file()]
    for size in todo:
        print(f"wrote {update(size, args.recipes, find_hardware(GPU))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
