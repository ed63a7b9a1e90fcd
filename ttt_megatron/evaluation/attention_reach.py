"""How far back attention sees: what is read further back must have been kept by other means."""

from dataclasses import dataclass

from ttt_megatron.config.schema import ModelConfig

_WINDOWED = ("attention", "swa_ttt_kvb")
_FULL = "full"


@dataclass(frozen=True)
class AttentionReach:
    """Keys a query sees, itself included, in one block (`window`) and through all of them one after
    the other (`stacked`); None is all, 0 a model without attention."""

    window: int | None
    stacked: int | None

    def sees(self, distance: int) -> bool:
        """Whether one attention reaches `distance` tokens, its own included."""
        return self.window is None or distance <= self.window

    def could_pass_on(self, distance: int) -> bool:
        """Whether attention of one block upon that of others reaches as far."""
        return self.stacked is None or distance <= self.stacked


def attention_reach(config: ModelConfig) -> AttentionReach:
    """Of a model's blocks together."""
    kinds = config.mixer_kinds
    windowed = sum(kind in _WINDOWED for kind in kinds)
    if _FULL in kinds or (windowed and config.window_size is None):
        return AttentionReach(None, None)
    if not windowed:
        return AttentionReach(0, 0)
    window = config.window_size or 0
    return AttentionReach(window, windowed * (window - 1) + 1)
