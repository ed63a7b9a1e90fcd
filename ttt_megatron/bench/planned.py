"""What the planner can be asked of a system: it counts attention with one window in all blocks."""

from dataclasses import replace

from ttt_megatron.config.schema import ATTENTION_MIXERS, RunConfig
from ttt_megatron.planning.mixers import knows_mixers
from ttt_megatron.planning.step_work import step_work
from ttt_megatron.planning.units import Work


def planned_work(config: RunConfig) -> Work | None:
    """Executed FLOPs and moved bytes of one sequence's step; None for models it does not count."""
    return step_work(config, tile=1).total if knows_mixers(config.model) else None


def no_less(config: RunConfig) -> RunConfig | None:
    """A run that the planner counts and that takes at least as much memory.

    Full attention in every block where some have a window; None if there are other mixers.
    """
    if set(config.model.mixer_kinds) <= set(ATTENTION_MIXERS) and not knows_mixers(config.model):
        return replace(config, model=replace(config.model, mixers="attention", window_size=None))
    return config if knows_mixers(config.model) else None
