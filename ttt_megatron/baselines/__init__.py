"""Sequence mixers that others have proposed, to compare with: Mamba 2, Gated DeltaNet, TTT-KVB.

Each takes attention's place in a block and is called as attention is.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ttt_megatron.baselines import initial_values, ttt_kvb_work
from ttt_megatron.baselines.gated_delta import GatedDeltaNet
from ttt_megatron.baselines.mamba2 import Mamba2
from ttt_megatron.baselines.ttt_kvb import TTTKVB
from ttt_megatron.baselines.ttt_kvb_swa import SWATTTKVB
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.slots import Slots

MIXER_MODULES: Mapping[str, Callable[[ModelConfig, Slots], nn.Module]] = {
    "mamba2": Mamba2,
    "gated_delta": GatedDeltaNet,
    "ttt_kvb": TTTKVB,
    "swa_ttt_kvb": SWATTTKVB,
}
"""What makes a mixer of a kind that model.mixers names."""


def with_mixers(slots: Slots, config: ModelConfig) -> Slots:
    """The same slots with every mixer, and how their own parameters are drawn."""

    def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        own = initial_values.initial_value(name, shape, generator)
        if own is not None:
            return own
        return ttt_kvb_work.initial_value(name, shape, generator, config.ttt_kvb)

    return replace(slots, mixers=MIXER_MODULES, initial_value=initial_value)
