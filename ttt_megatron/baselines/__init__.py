"""Sequence mixers that others have proposed, to compare with: Mamba 2, Gated DeltaNet, TTT-KVB.

Each takes attention's place in a block and is called as attention is.
"""

from collections.abc import Callable, Mapping

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


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """The initial value, float32, of a parameter that only mixers have; None of all others."""
    own = initial_values.initial_value(name, shape, generator)
    return own if own is not None else ttt_kvb_work.initial_value(name, shape, generator)
