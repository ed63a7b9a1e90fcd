"""The layout to take on so many GPUs, where a recipe does not say."""

from dataclasses import dataclass, replace

from ttt_megatron.config.convert import build, to_flat
from ttt_megatron.config.layouts import LAYOUT_KEYS
from ttt_megatron.config.recipe import named_keys
from ttt_megatron.config.schema import ATTENTION_MIXERS, RunConfig
from ttt_megatron.config.validate import validate
from ttt_megatron.errors import UserError
from ttt_megatron.planning.estimate import Estimate
from ttt_megatron.planning.hardware import Hardware
from ttt_megatron.planning.layout import Layout
from ttt_megatron.planning.mixers import knows_mixers
from ttt_megatron.planning.search import make_plan

_TRIED = 5


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layout chosen, and the run with it; `note` says what the plan does not know."""

    estimate: Estimate
    config: RunConfig
    note: str | None = None


def choose_layout(config: RunConfig, hardware: Hardware, gpus: int) -> Choice:
    """The fastest layout of a plan that the run's own rules allow.

    Models whose mixers are not planned are planned as windowed attention of the same shape, in
    layouts that their mixers can take: memory and time are then guesses.

    Raises UserError as `make_plan` does, and where the rules allow none of the best.
    """
    known = knows_mixers(config.model)
    as_planned, note = config, None
    if not known:
        as_planned = replace(config, model=replace(config.model, mixers="attention"))
        note = f"{config.model.mixers} is not planned: as for windowed attention of its shape"
    cuttable = set(config.model.mixer_kinds) <= set(ATTENTION_MIXERS)

    def allowed(layout: Layout) -> bool:
        return known or (layout.context == 1 and (cuttable or layout.tensor == 1))

    try:
        best = make_plan(as_planned, hardware, gpus, _TRIED, allowed).best
    except UserError as error:
        raise UserError(f"{error} ({note})" if note else str(error)) from None
    refused = ""
    for estimate in best:
        made = with_layout(config, estimate.layout)
        try:
            validate(made, config.name)
        except UserError as error:
            refused = refused or str(error)
            continue
        return Choice(estimate=estimate, config=made, note=note)
    raise UserError(f"none of the best layouts of {gpus} GPUs can be trained: {refused}")


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """The run under another layout, all that a layout sets included. Does not validate."""
    own = {key: value for key, value in to_flat(config).items() if key not in LAYOUT_KEYS}
    if not layout.two_level:
        own.pop("inner.segment_chunks")
    return build(own | named_keys(None, layout.overrides()))
