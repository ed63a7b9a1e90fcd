"""Which parameters weight decay leaves alone."""

from torch import Tensor, nn

from ttt_megatron.config.schema import OptimizerConfig

_MARK = "ttt_megatron_never_decays"


def undecayed(value: Tensor) -> nn.Parameter:
    """A parameter of this value that never decays, whatever optimizer.decay says."""
    parameter = nn.Parameter(value)
    setattr(parameter, _MARK, True)
    return parameter


def decays(parameter: Tensor, config: OptimizerConfig) -> bool:
    """Whether weight decay shrinks a parameter."""
    if getattr(parameter, _MARK, False):
        return False
    return config.decay == "all" or parameter.ndim >= 2
