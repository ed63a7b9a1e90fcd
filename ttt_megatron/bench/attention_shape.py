"""The shapes that attention is measured at, and the least that a pass takes there."""

from dataclasses import dataclass

import torch

from ttt_kernels.swa_attention.work import attention_work
from ttt_kernels.work import Work

# Tensors of q's size that a pass reads or writes; cached keys and values are read besides.
_MOVED = {"forward": 4, "inner_backward": 8, "pair_forward": 8, "pair_backward": 16}


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """`length` queries with their own keys behind `past` cached ones, one sequence."""

    heads: int
    head_dim: int
    length: int
    past: int
    window: int

    def __str__(self) -> str:
        keys = f" behind {self.past:,} cached keys" if self.past else ""
        heads = f"{self.heads} heads of {self.head_dim}"
        return f"{self.length:,} tokens{keys}, window {self.window:,}, {heads}"

    @property
    def sees_all(self) -> bool:
        """Whether the window hides no key before a query."""
        return self.window >= self.length + self.past

    def work(self, kernel: str, dtype: torch.dtype) -> Work:
        """The least a pass takes: products inside the window; inputs and results moved once."""
        size = dtype.itemsize
        flops = attention_work(
            kernel,
            batch=1,
            num_heads=self.heads,
            length=self.length,
            head_dim=self.head_dim,
            window=self.window,
            past=self.past,
            element_size=size,
        ).flops
        own, cached = self.heads * self.head_dim * self.length, 2 * self.past
        tensors = (
            own * _MOVED[kernel.removesuffix("_saved").removesuffix("_known")]
            + self.heads * self.head_dim * cached
        )
        rows = self.heads * self.length * 4 * (1 if kernel == "forward" else 2)
        return Work(flops, tensors * size + rows)
