"""A recipe with its layout on so many GPUs: its own, one chosen beforehand, or a plan's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ttt_megatron.config.layouts import LAYOUTS_FILE, is_shape, layout_beside
from ttt_megatron.config.recipe import load_recipe, named_keys
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.planning.choice import choose_layout
from ttt_megatron.planning.hardware import Hardware

OWN_LAYOUT = frozenset(
    {
        "parallel.data",
        "parallel.tensor",
        "parallel.sequence_parallel",
        "parallel.context",
        "parallel.context_order",
        "parallel.pipeline",
        "parallel.virtual_pipeline",
    }
)
"""Keys by which a recipe or an override says itself how processes share the work."""


@dataclass(frozen=True, kw_only=True)
class LaidOut:
    """A run with its layout, the settings that make it so of the recipe, and whose choice it is.

    The settings contain the overrides given.
    """

    config: RunConfig
    settings: list[str]
    source: str


def lay_out(recipe: str | Path, overrides: Sequence[str], gpus: int, hardware: Hardware) -> LaidOut:
    """The recipe with overrides on so many GPUs.

    A layout that the recipe or an override names stands, with as many data-parallel processes as
    fill the GPUs unless it names these too; else that of `layouts.yaml` beside the recipe, if it
    holds one and no override changes shapes; else the fastest that a plan finds.

    Raises UserError as `load_recipe`, `layout_beside` and `choose_layout` do, and where the file
    says that none fits.
    """
    path, given = Path(recipe), list(overrides)
    named = named_keys(path, given).keys() & OWN_LAYOUT
    if named:
        return _own(path, given, gpus, fill="parallel.data" not in named)
    config = load_recipe(path, given)
    chosen = chosen_before(path, given, config.training.precision, gpus, hardware.name)
    if chosen is not None:
        settings = [*chosen, *given]
        source = str(path.with_name(LAYOUTS_FILE))
        return LaidOut(config=load_recipe(path, settings), settings=settings, source=source)
    found = choose_layout(config, hardware, gpus).estimate.layout.overrides()
    settings = [*found, *given]
    return LaidOut(config=load_recipe(path, settings), settings=settings, source="the plan")


def chosen_before(
    recipe: Path, overrides: Sequence[str], precision: str, gpus: int, gpu: str
) -> list[str] | None:
    """The settings that `layouts.yaml` beside a recipe holds for so many GPUs of a kind.

    None where it holds none, or an override, or the recipe itself since, changes what they were
    chosen for. Raises UserError as `layout_beside` does, and where the file says that none fits.
    """
    if any(is_shape(key) for key in named_keys(None, overrides)):
        return None
    chosen = layout_beside(recipe, gpus, precision, gpu)
    if chosen is None:
        return None
    if chosen.unfit is not None:
        raise UserError(f"{recipe}: {chosen.unfit} ({recipe.with_name(LAYOUTS_FILE)})")
    return list(chosen.overrides)


def _own(path: Path, given: list[str], gpus: int, *, fill: bool) -> LaidOut:
    """The layout that a recipe or overrides name, over all GPUs where it can be."""
    # Data-parallel processes may be what makes the batch divide: validated with their number.
    parallel = replace(load_recipe(path, [*given, *_one_replica(fill)]).parallel, data=1)
    replica = parallel.world_size
    if fill:
        if gpus % replica:
            raise UserError(
                f"{path}: a replica takes {replica} processes (parallel.tensor = "
                f"{parallel.tensor} times parallel.context = {parallel.context} times "
                f"parallel.pipeline = {parallel.pipeline}), which does not divide {gpus} GPUs; "
                "change one of them"
            )
        given = [*given, f"parallel.data={gpus // replica}"]
    return LaidOut(config=load_recipe(path, given), settings=given, source="the recipe")


def _one_replica(fill: bool) -> list[str]:
    return ["parallel.data=1"] if fill else []
