"""Output head and cross-entropy: the definition."""

import torch.nn.functional as F
from torch import Tensor

from ttt_kernels.dtypes import accumulation_dtype


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(Σ_t token_weights_t · nll_t, nll), logits in hidden's dtype, the loss in float32 or float64.

    Shapes: hidden [..., H], weight [V, H], targets and token_weights [...]; a scalar and [...].
    """
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(accumulation_dtype(hidden.dtype))
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    nll = nll.view_as(token_weights)
    return (nll * token_weights).sum(), nll
