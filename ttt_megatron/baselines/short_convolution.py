"""The short causal convolution in front of both recurrences."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """Every channel a weighted sum over its last tokens, then SiLU.

    weight [channels, kernel], the last column for the token itself; bias [channels] or None.
    """

    def __init__(self, channels: int, kernel: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """[b, T, channels] → the same shape and dtype, and the last kernel − 1 inputs.

        past [b, kernel − 1, channels] are the inputs just before, None before the first token.
        """
        length, kernel = x.shape[1], self.weight.shape[1]
        if past is None:
            past = x.new_zeros(len(x), kernel - 1, x.shape[2])
        seen = torch.cat((past, x), dim=1)
        # Summed in the weights' float32 for bf16 inputs. The slices are views: autograd keeps the
        # inputs once, not kernel times.
        total = seen[:, :length] * self.weight[:, 0]
        for offset in range(1, kernel):
            total = total + seen[:, offset : offset + length] * self.weight[:, offset]
        if self.bias is not None:
            total = total + self.bias
        # A copy of its own: a view would keep all of the inputs alive.
        return F.silu(total).to(x.dtype), seen[:, length:].clone()
