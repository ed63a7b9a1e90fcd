"""Parameters of a model with any mixers, from the shapes alone."""

from dataclasses import replace

from ttt_megatron.baselines.ttt_kvb_work import swa_ttt_kvb_parameters, ttt_kvb_parameters
from ttt_megatron.baselines.work import gated_delta_parameters, mamba2_parameters
from ttt_megatron.config.schema import ATTENTION_MIXERS, ModelConfig
from ttt_megatron.model.parameters import ParameterCounts, attention_parameters, count_parameters

_MIXERS = {
    "mamba2": mamba2_parameters,
    "gated_delta": gated_delta_parameters,
    "ttt_kvb": ttt_kvb_parameters,
    "swa_ttt_kvb": swa_ttt_kvb_parameters,
}


def count_with_mixers(config: ModelConfig) -> ParameterCounts:
    """Counts a configuration's parameters; other mixers than attention are in `blocks`."""
    counts = count_parameters(config)
    matrices, gains = attention_parameters(config)
    others = [kind for kind in config.mixer_kinds if kind not in ATTENTION_MIXERS]
    own = sum(_MIXERS[kind](config) for kind in others)
    return replace(
        counts,
        blocks=counts.blocks + own - matrices * len(others),
        norms=counts.norms - gains * len(others),
    )
