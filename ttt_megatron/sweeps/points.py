"""The runs of a sweep, each with its whole configuration, checked before any begins."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttt_megatron.config.convert import build
from ttt_megatron.config.keys import known_keys
from ttt_megatron.config.recipe import named_keys
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.validate import validate
from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.spec import SEED, Axis, Sweep
from ttt_megatron.sweeps.sweep_file import check_key

POINTS = "points"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run. `group` is its name without the seed, `settings` what makes it differ from others
    but for the seed; `named` if the sweep's file gives it a name."""

    index: int
    name: str
    group: str
    settings: dict[str, Any]
    seed: int | None
    named: bool
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Where its run lies."""
        return Path(self.config.training.output)


def make_points(sweep: Sweep, output: Path, overrides: Sequence[str] = ()) -> list[Point]:
    """Every point, in order: the grid of the axes, then the named ones, each with all seeds.

    Overrides are `key=value` over the base and the sweep's `set`.

    Raises UserError for an override of a key that is varied, points of one name, and for points
    that are impossible, all of them by name.
    """
    shared = {**named_keys(sweep.base), **sweep.settings, **_overrides(sweep, overrides)}
    groups = list(_groups(sweep))
    twice = [name for name, count in Counter(name for name, *_ in groups).items() if count > 1]
    if twice:
        raise UserError(f"{sweep.source}: two points are called {twice[0]}; change one's values")
    points: list[Point] = []
    for group, settings, named in groups:
        for seed in sweep.seeds or (None,):
            name = group if seed is None else f"{group}_seed-{seed}"
            flat = {**shared, **settings, **({} if seed is None else {SEED: seed})}
            points.append(
                Point(
                    index=len(points),
                    name=name,
                    group=group,
                    settings=settings,
                    seed=seed,
                    named=named,
                    config=_config(sweep, name, flat, output),
                )
            )
    found = {point.name: _problem(sweep, point) for point in points}
    problems = {name: problem for name, problem in found.items() if problem is not None}
    refuse_points(sweep.source, problems, len(points))
    return points


def refuse_points(source: str, problems: Mapping[str, str], total: int) -> None:
    """Raises one UserError about all points that cannot run, if there are any; `problems` by name.

    What several have in common is said once.
    """
    if not problems:
        return
    names: dict[str, list[str]] = {}
    for name, problem in problems.items():
        names.setdefault(problem.rstrip("."), []).append(name)
    told = [
        f"point{'s' * (len(own) > 1)} {', '.join(own)}: {problem}" for problem, own in names.items()
    ]
    raise UserError(f"{source}: {len(problems)} of {total} points cannot run: {'; '.join(told)}.")


def find_points(points: Sequence[Point], names: Sequence[str], index: int | None) -> list[Point]:
    """The points of these names and of this number; all if none is asked for.

    Raises UserError for a name or a number that there is not.
    """
    import difflib

    by_name = {point.name: point for point in points}
    chosen = []
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.0)[0]
            raise UserError(f"--only {name}: there is no such point; the nearest is {near}")
        chosen.append(by_name[name])
    if index is not None:
        if not 0 <= index < len(points):
            raise UserError(
                f"--only-index {index}: the {len(points)} points are 0 to {len(points) - 1}"
            )
        chosen.append(points[index])
    return chosen or list(points)


def _overrides(sweep: Sweep, overrides: Sequence[str]) -> dict[str, Any]:
    flat = named_keys(None, overrides)
    for key, value in flat.items():
        check_key(key, f"override {key}={value}")
        if key in sweep.varied or (key == SEED and sweep.seeds):
            raise UserError(
                f"override {key}={value}: {sweep.source} varies this key; change the values there"
            )
    return flat


def _groups(sweep: Sweep) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name, settings and whether it was given by name, of every point but for its seed."""
    # Seeds without anything else to vary are those of the base.
    if sweep.axes or not sweep.named_points:
        for chosen in itertools.product(*(axis.values for axis in sweep.axes)):
            words: list[str] = []
            settings: dict[str, Any] = {}
            for axis, values in zip(sweep.axes, chosen, strict=True):
                words.append(_axis_word(axis, values))
                settings |= dict(zip(axis.keys, values, strict=True))
            yield "_".join(words) or "base", settings, False
    for name, settings in sweep.named_points.items():
        yield name, settings, True


def _axis_word(axis: Axis, values: tuple[Any, ...]) -> str:
    """What a place on an axis is called: by its first key where that tells the places apart."""
    first = [place[0] for place in axis.values]
    count = 1 if len(set(first)) == len(first) else len(axis.keys)
    pairs = list(zip(axis.keys, values, strict=True))[:count]
    return "_".join(f"{short_key(key)}-{_word(value)}" for key, value in pairs)


def short_key(key: str) -> str:
    """A key's last part, or all of it where others of as few sections end alike."""
    leaf, depth = key.rpartition(".")[2], key.count(".")
    near = [other for other in known_keys() if other.count(".") <= depth]
    alike = sum(other.rpartition(".")[2] == leaf for other in near)
    return leaf if alike == 1 else key


def show_value(value: Any) -> str:
    """A setting's value as a recipe would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _word(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", show_value(value)).strip("-") or "empty"


def _config(sweep: Sweep, name: str, flat: dict[str, Any], output: Path) -> RunConfig:
    own = {
        "name": f"{sweep.name}-{name}",
        "training.output": str(output / POINTS / name),
        "tracking.progress": False,
    }
    return build({**flat, **own})


def _problem(sweep: Sweep, point: Point) -> str | None:
    try:
        validate(point.config, point.name)
    except UserError as error:
        return str(error).removeprefix(f"{point.name}: ")
    if sweep.loss.startswith("validation") and not point.config.training.eval_sequences:
        return (
            f"{sweep.loss} is measured, and training.eval_sequences = 0 reads "
            "no validation sequences; set it, or measure.loss: loss"
        )
    return None


def with_tracking(point: Point, uri: str | None, parent: str | None) -> Point:
    """The point, logging to a store under the sweep's own run."""
    tracking = replace(point.config.tracking, tracking_uri=uri, parent_run=parent)
    return replace(point, config=replace(point.config, tracking=tracking))
