"""Which models plans know: attention with one window, or none, in all blocks."""

from ttt_megatron.config.schema import ModelConfig


def knows_mixers(model: ModelConfig) -> bool:
    """Whether work and memory of a model are counted rightly."""
    return set(model.mixer_kinds) == {"attention"}


def require_known_mixers(model: ModelConfig) -> None:
    """Raises ValueError for a model that would be counted as another."""
    if not knows_mixers(model):
        raise ValueError(f"plans know no model.mixers = {model.mixers}")
