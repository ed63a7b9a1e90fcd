"""Folders that a run in a container needs to see under the paths that it knows them by."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ttt_megatron.config import RunConfig
from ttt_megatron.config.recipe import recipe_files


def needed_mounts(
    work: Path,
    runs: Iterable[RunConfig],
    recipes: Iterable[Path],
    others: Iterable[Path] = (),
) -> list[Path]:
    """The folders of runs, absolute, that lie outside of the work folder, which is mounted itself.

    Of each run its output's, and the one that holds it, its data's, and that of what it starts
    from; of each recipe's file, of the recipes it extends and of the files `others` those that hold
    them. A folder that a link leads to is there too, so that a link within the work folder leads
    somewhere. None has to exist yet.

    Raises UserError for a recipe that cannot be read.
    """
    wanted: list[Path] = []
    for config in runs:
        output = Path(config.training.output)
        wanted += [output.absolute().parent, output]
        wanted += [Path(config.data.path)] if config.data.path else []
        wanted += [Path(config.training.init_from)] if config.training.init_from else []
    wanted += [path.parent for recipe in recipes for path in recipe_files(recipe)]
    wanted += [other.absolute().parent for other in others]
    return _outermost(work, wanted)


def _outermost(work: Path, wanted: Sequence[Path]) -> list[Path]:
    """Both names of every folder, without those that lie below the work folder or another."""
    names = dict.fromkeys(
        name for path in wanted for name in (_plain(path.absolute()), path.resolve())
    )
    known = [work, *names]
    return [
        name
        for name in names
        if not any(name.is_relative_to(other) and name != other for other in known) and name != work
    ]


def _plain(path: Path) -> Path:
    """A path without `..`, which mounts do not take, its links left as they are."""
    return Path(os.path.normpath(path))
