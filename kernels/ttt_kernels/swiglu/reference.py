"""SwiGLU: the definition."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up. Shapes: gate_up [..., 2I] (gate first) → [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
