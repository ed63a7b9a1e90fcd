"""The planner: the recipe's layout and the fastest others that fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.planning.estimate import Estimate, Estimator
from ttt_megatron.planning.hardware import GIB, Hardware
from ttt_megatron.planning.layout import Layout, grids, problem, recipe_layout, variants
from ttt_megatron.planning.units import in_float8

CLOSE = 1.02
"""Layouts whose steps differ by less than this factor count as equally fast."""


@dataclass(frozen=True)
class Plan:
    """`recipe` is the recipe's layout, or None with the reason in `note`; `best` are in order."""

    config: RunConfig
    hardware: Hardware
    gpus: int
    recipe: Estimate | None
    note: str | None
    best: list[Estimate]


def _any(layout: Layout) -> bool:
    """Every layout will do."""
    return True


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    gpus: int | None = None,
    top: int = 5,
    allowed: Callable[[Layout], bool] = _any,
) -> Plan:
    """Plans a run on `gpus` GPUs; None takes as many as the recipe's layout has processes.

    The best are of the `allowed` layouts.

    Raises UserError where the model has no vocabulary, the GPU no float8 that is asked for, no
    layout divides the GPUs, or none fits.
    """
    if in_float8(config) and not hardware.fp8_tflops:
        raise UserError(
            f"training.precision=fp8: {hardware.name} has no products in float8; set "
            "training.precision=bf16 or take another --gpu"
        )
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size is not set; add model.vocab_size=NUMBER")
    asked = recipe_layout(config)
    gpus = asked.gpus if gpus is None else gpus
    recipe, note = _recipe(config, hardware, asked, gpus)
    best = _search(config, hardware, gpus, top, allowed)
    return Plan(config, hardware, gpus, recipe, note, best)


def _recipe(
    config: RunConfig, hardware: Hardware, asked: Layout, gpus: int
) -> tuple[Estimate | None, str | None]:
    """The recipe's layout; data-parallel replicas are added or taken away to fill the GPUs."""
    replica = asked.gpus // asked.data
    if gpus % replica:
        reason = f"its replicas take {replica} GPUs each, which does not divide {gpus}"
        return None, f"The recipe's layout cannot fill {gpus} GPUs: {reason}."
    layout = replace(asked, data=gpus // replica)
    obstacle = problem(config, layout, hardware.gpus_per_node)
    if obstacle is not None:
        return None, f"The recipe's layout cannot fill {gpus} GPUs: {obstacle}."
    estimator = Estimator(config, layout, hardware)
    if layout.schedule not in estimator.names():
        return None, f"The recipe's layout, {layout} {layout.schedule}, cannot be simulated."
    return estimator.estimate(schedule=layout.schedule), None


def _search(
    config: RunConfig,
    hardware: Hardware,
    gpus: int,
    top: int,
    allowed: Callable[[Layout], bool],
) -> list[Estimate]:
    grid = [shape for shape in grids(config, gpus, hardware.gpus_per_node) if allowed(shape)]
    if not grid:
        tokens = config.data.sequence_length
        raise UserError(
            f"no layout divides {gpus} GPUs among {config.training.global_batch_size} sequences of "
            f"{tokens} tokens: choose a number of GPUs that is a product of divisors of the batch, "
            f"of the {tokens // config.inner.chunk_size} chunks and of the heads"
        )
    candidates: list[tuple[float, Layout]] = []
    least, leanest = float("inf"), grid[0]
    for shape in grid:
        for layout in variants(config, shape):
            seconds, size = Estimator(config, layout, hardware).floor()
            if size < least:
                least, leanest = size, layout
            if size <= hardware.memory_bytes:
                candidates.append((seconds, layout))
    candidates.sort(key=lambda item: item[0])
    best: dict[tuple[int, int, int, int], Estimate] = {}
    for floor, layout in candidates:
        known = best.get(layout.grid)
        if known is not None and known.step_seconds <= floor * CLOSE:
            continue
        ranked = sorted(entry.step_seconds for entry in best.values())
        if len(ranked) >= top and floor > ranked[top - 1] * CLOSE:
            break
        found = Estimator(config, layout, hardware).estimate(quick=True)
        if found.fits and (known is None or found.step_seconds < known.step_seconds):
            best[layout.grid] = found
    if not best:
        raise UserError(
            f"no layout of {gpus} x {hardware.name} fits: the leanest, {leanest} with "
            f"{leanest.choices}, needs {least / GIB:.1f} GiB a GPU of "
            f"{hardware.memory_bytes / GIB:.1f} usable ones; take more GPUs, larger ones, or "
            "shorter sequences"
        )
    ranked_best = _ranked(list(best.values()))[:top]
    return [Estimator(config, e.layout, hardware).estimate() for e in ranked_best]


def _ranked(found: list[Estimate]) -> list[Estimate]:
    """Fastest first; of nearly equal ones the one with fewer stages, context and tensor ranks."""
    rest, ranked = sorted(found, key=lambda entry: entry.step_seconds), []
    while rest:
        close = [e for e in rest if e.step_seconds <= rest[0].step_seconds * CLOSE]
        chosen = min(close, key=_simplicity)
        ranked.append(chosen)
        rest.remove(chosen)
    return ranked


def _simplicity(entry: Estimate) -> tuple[int, int, int]:
    layout = entry.layout
    return layout.pipeline, layout.context, layout.tensor
