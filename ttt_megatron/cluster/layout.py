"""How a recipe is laid over the processes of a job, before anything is submitted."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_megatron.cluster.profile import Profile
from ttt_megatron.config import RunConfig, load_recipe
from ttt_megatron.config.convert import build
from ttt_megatron.config.layouts import LAYOUTS_FILE
from ttt_megatron.config.recipe import named_keys
from ttt_megatron.errors import UserError

_SIZES = ("parallel.data", "parallel.tensor", "parallel.context", "parallel.pipeline")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A recipe on `nodes` with `processes` each.

    config: with its layout, validated; overrides: those that set the layout; origin: who chose it,
    in words.
    """

    config: RunConfig
    nodes: int
    processes: int
    overrides: list[str]
    origin: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A recipe without a layout of its own, and the processes it has to fill."""

    recipe: Path
    overrides: Sequence[str]
    config: RunConfig
    named: dict[str, Any]
    gpus: int
    exact: bool
    """Whether all of them must be used, as --nodes was given."""
    gpu: str
    """Kind of GPU, as `ttt-megatron plan` names it."""


Answer = tuple[list[str], str]
"""Overrides, and who chose them."""


def place(recipe: str, overrides: Sequence[str], nodes: int | None, profile: Profile) -> Placement:
    """Finds the layout of a recipe: its own, else the first that the `SOURCES` have an answer for.

    A recipe, or an override, that names a size under `parallel` is taken at its word; without
    parallel.data the replicas fill the nodes. `nodes` None takes as few as that needs, else one.

    Raises UserError as `load_recipe` does, and where the processes do not fill the nodes evenly or
    no layout does.
    """
    named = named_keys(recipe, overrides)
    config = build(named)
    if nodes is not None and nodes < 1:
        raise UserError(f"--nodes {nodes}: give 1 or more")
    if any(key in named for key in _SIZES):
        return _as_named(recipe, overrides, named, nodes, profile)
    exact, nodes = nodes is not None, nodes or 1
    question = Question(
        recipe=Path(recipe),
        overrides=overrides,
        config=config,
        named=named,
        gpus=nodes * profile.processes,
        exact=exact,
        gpu=profile.gpu,
    )
    for source in SOURCES:
        answer = source(question)
        if answer is not None:
            break
    assert answer is not None
    chosen, origin = answer
    # What the command says comes last, and wins.
    config = load_recipe(recipe, [*chosen, *overrides])
    return Placement(
        config=config,
        nodes=nodes,
        processes=config.parallel.world_size // nodes,
        overrides=chosen,
        origin=origin,
    )


def _as_named(
    recipe: str,
    overrides: Sequence[str],
    named: dict[str, Any],
    nodes: int | None,
    profile: Profile,
) -> Placement:
    most, added = profile.processes, []
    if "parallel.data" not in named:
        replica = build(named).parallel.world_size
        total = most * (nodes or -(-replica // most))
        if total % replica:
            raise UserError(
                f"{recipe}: tensor, context and pipeline make replicas of {replica} processes, "
                f"which do not fill {total} evenly: change one of them or --nodes"
            )
        added = [f"parallel.data={total // replica}"]
    config = load_recipe(recipe, [*added, *overrides])
    size = config.parallel.world_size
    needed = nodes or -(-size // most)
    if size % needed or size // needed > most:
        raise UserError(
            f"{recipe}: its parallel section makes {size} processes, which do not fit {needed} "
            f"nodes of {most} evenly: set --nodes, or parallel.data={most * needed} and the other "
            "sizes to what fits"
        )
    return Placement(
        config=config,
        nodes=needed,
        processes=size // needed,
        overrides=added,
        origin="as the recipe and the command say",
    )


def _chosen_before(question: Question) -> Answer | None:
    """What `layouts.yaml` beside the recipe holds for so many GPUs."""
    from ttt_megatron.planning.laid_out import chosen_before

    training, recipe = question.config.training, question.recipe
    if training.device == "cpu":
        return None
    chosen = chosen_before(
        recipe, question.overrides, training.precision, question.gpus, question.gpu
    )
    return None if chosen is None else (chosen, f"as {recipe.with_name(LAYOUTS_FILE)} has it")


def _planned(question: Question) -> Answer | None:
    """The planner's best, for models it knows; with it come micro-batch and memory settings."""
    from ttt_megatron.planning.hardware import find_hardware
    from ttt_megatron.planning.mixers import knows_mixers
    from ttt_megatron.planning.search import make_plan

    config = question.config
    if config.training.device == "cpu" or question.gpu == "cpu":
        return None
    if config.model.vocab_size is None or not knows_mixers(config.model):
        return None
    plan = make_plan(config, find_hardware(question.gpu), question.gpus)
    for found in plan.best:
        chosen = found.layout.overrides()
        # A plan knows nothing of settings such as training.cuda_graphs, which exclude some layouts.
        with suppress(UserError):
            load_recipe(question.recipe, [*chosen, *question.overrides])
            return chosen, "as `ttt-megatron plan` advises"
    return None


def _data_parallel(question: Question) -> Answer:
    """A replica a process, with micro-batches of the recipe's size or the next that fits."""
    training, gpus = question.config.training, question.gpus
    if not question.exact:
        gpus = max(n for n in range(1, gpus + 1) if training.global_batch_size % n == 0)
    if training.global_batch_size % gpus:
        raise UserError(
            f"{question.recipe}: training.global_batch_size = {training.global_batch_size} is not "
            f"a multiple of the {gpus} processes: change it or --nodes, or give a layout of its "
            "own under parallel"
        )
    share = training.global_batch_size // gpus
    fitting = [n for n in range(1, training.micro_batch_size + 1) if share % n == 0]
    chosen = [f"parallel.data={gpus}"]
    if fitting[-1] != training.micro_batch_size:
        chosen.append(f"training.micro_batch_size={fitting[-1]}")
    return chosen, "data-parallel alone"


SOURCES: tuple[Callable[[Question], Answer | None], ...] = (
    _chosen_before,
    _planned,
    _data_parallel,
)
"""Who is asked for a layout, one after the other; the last always has an answer."""
