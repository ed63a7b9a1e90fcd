"""What the planner can be asked of a system: it counts softmax attention, of one kind a model.

It takes the window of all blocks from the model, and knows no other mixers.
"""

from dataclasses import replace

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning.step_work import step_work
from ttt_megatron.planning.units import Work


def as_planned(config: RunConfig) -> RunConfig | None:
    """The same run as the planner counts it rightly; None if it has mixers that it does not know,
    or windows in some blocks and none in others."""
    kinds = set(config.model.mixer_kinds)
    if kinds == {"attention"}:
        return config
    if kinds == {"full"}:
        return _without_window(config)
    return None


def planned_work(config: RunConfig) -> Work | None:
    """Executed FLOPs and moved bytes of one sequence's step; None as in `as_planned`."""
    planned = as_planned(config)
    return None if planned is None else step_work(planned, tile=1).total


def no_less(config: RunConfig) -> RunConfig | None:
    """A run of softmax attention that the planner counts and that takes at least as much memory.

    Full attention in every block where some have a window; None if there are other mixers.
    """
    kinds = set(config.model.mixer_kinds)
    if kinds == {"attention", "full"}:
        return _without_window(config)
    return as_planned(config)


def _without_window(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, mixers="attention", window_size=None))
