"""Which parameters weight decay leaves alone."""

from torch import Tensor, nn

from ttt_megatron.config.schema import OptimizerConfig

_NEVER = "ttt_megatron_never_decays"
_VECTORS = "ttt_megatron_vectors"


def undecayed(value: Tensor) -> nn.Parameter:
    """A parameter of this value that never decays, whatever optimizer.decay says."""
    parameter = nn.Parameter(value)
    setattr(parameter, _NEVER, True)
    return parameter


def vectors(value: Tensor) -> nn.Parameter:
    """Gains or biases of several heads, one in each row: no matrix to optimizer.decay=matrices."""
    parameter = nn.Parameter(value)
    setattr(parameter, _VECTORS, True)
    return parameter


def decays(parameter: Tensor, config: OptimizerConfig) -> bool:
    """Whether weight decay shrinks a parameter."""
    if getattr(parameter, _NEVER, False):
        return False
    is_matrix = parameter.ndim >= 2 and not getattr(parameter, _VECTORS, False)
    return config.decay == "all" or is_matrix
