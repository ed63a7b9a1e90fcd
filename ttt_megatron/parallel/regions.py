"""Tokens and partial sums between the processes of a tensor-parallel group.

Tensors are [..., T, H]; all functions treat leading axes alike, so a pair passes like a batch.
Every tensor is made contiguous before a collective sees it: gloo and NCCL read raw memory.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

TOKENS = -2


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the group; x itself is left alone."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def max_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """The maximum over the group; x itself is left alone."""
    highest = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return highest


def join(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' tensors, concatenated along `dim`."""
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def own_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of x along `dim`."""
    return x.chunk(group.size(), dim=dim)[group.rank()].contiguous()


def sum_own_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part, along `dim`, of the sum over the group."""
    parts = [part.contiguous() for part in x.chunk(group.size(), dim=dim)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=group)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.contiguous(), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        return join(x, TOKENS, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        back = sum_own_part if ctx.partial else own_part
        return back(grad, TOKENS, ctx.group), None, None


class _SumOwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_own_part(x, TOKENS, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return join(grad, TOKENS, ctx.group), None


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return own_part(x, TOKENS, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return join(grad, TOKENS, ctx.group), None


def copy_to_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, about to be used by every rank in another way: its gradients are summed."""
    out: Tensor = _Copy.apply(x, group)
    return out


def sum_of_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' partial results; the gradient is each rank's."""
    out: Tensor = _Sum.apply(x, group)
    return out


def gather_tokens(x: Tensor, group: ProcessGroup, *, partial: bool) -> Tensor:
    """All tokens [..., T, H] from the ranks' own [..., T/R, H].

    `partial`: every rank's gradient is a share of the whole one (it is summed), and not the whole
    one itself.
    """
    out: Tensor = _GatherTokens.apply(x, group, partial)
    return out


def sum_own_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's tokens [..., T/R, H] of the sum of the ranks' partial results [..., T, H]."""
    out: Tensor = _SumOwnTokens.apply(x, group)
    return out


def own_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's tokens [..., T/R, H] of what all ranks hold; the gradient is all ranks'."""
    out: Tensor = _OwnTokens.apply(x, group)
    return out
