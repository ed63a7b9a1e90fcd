"""The output head with its loss: first order, with all gradients, and on pairs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_kernels import linear_cross_entropy, linear_cross_entropy_pair
from ttt_kernels.linear_cross_entropy.work import head_work
from ttt_kernels.work import Work
from ttt_megatron.bench.baselines import DTYPES, ON_CPU, compiled
from ttt_megatron.bench.case import Case, Group, Missing


def head_group(
    tokens: int,
    vocabulary: int,
    width: int,
    precision: str,
    device: torch.device,
    rounds: int,
) -> Group:
    """One chunk's head. The head's gradients are formed with its loss, so a case is both passes."""
    size = DTYPES[precision].itemsize
    slow = 1e-10 if device.type == "cpu" else 1e-14
    return Group(
        section="kernels",
        operation="head and cross-entropy",
        shape=f"{tokens:,} tokens, vocabulary {vocabulary:,}, width {width:,}",
        precision=precision,
        build=lambda: _cases(tokens, vocabulary, width, DTYPES[precision], device),
        # The plain one keeps logits, log-softmax and both cotangents.
        memory_bytes=tokens * vocabulary * (2 * size + 12.0) + 16.0 * vocabulary * width,
        seconds=2.0 * tokens * vocabulary * width * 20 * slow,
        rounds=rounds,
    )


def _cases(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device
) -> list[Case | Missing]:
    hidden = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    pair = torch.randn(2, 1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device) * 0.02
    weight = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    targets = torch.randint(vocabulary, (1, tokens), device=device)
    share = torch.full((1, tokens), 1 / tokens, device=device, dtype=weight.dtype)
    on_gpu = device.type == "cuda"

    def work(kernel: str) -> Work:
        return head_work(
            kernel,
            tokens=tokens,
            vocabulary=vocabulary,
            width=width,
            element_size=dtype.itemsize,
        )

    def for_hidden(_: Any) -> Any:
        loss, _nll = linear_cross_entropy(hidden, weight.detach(), targets, share)
        return torch.autograd.grad(loss, hidden)

    def for_all(_: Any) -> Any:
        loss, _nll = linear_cross_entropy(hidden, weight, targets, share)
        return torch.autograd.grad(loss, (hidden, weight))

    def of_pair(_: Any) -> Any:
        total = linear_cross_entropy_pair(pair, weight, targets, share, -share)
        return torch.autograd.grad(total, (pair, weight))

    def plain_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight.to(hidden.dtype)).flatten(0, 1)
        return F.cross_entropy(logits.to(share.dtype), targets.flatten())

    names = ("loss, gradient of hidden states", "loss, all gradients", "pair, all gradients")
    cases: list[Case | Missing] = [
        Case(name=names[0], run=for_hidden, work=work("hidden"), replayable=on_gpu),
        Case(name=names[1], run=for_all, work=work("full"), replayable=on_gpu),
        Case(name=names[2], run=of_pair, work=work("pair"), replayable=on_gpu),
    ]
    losses: dict[str, Any] = {"plain PyTorch": plain_loss}
    if on_gpu:
        losses["torch.compile"] = compiled(plain_loss)
    else:
        cases.append(Missing(name=names[1], way="torch.compile", reason=ON_CPU))
    for way, loss in losses.items():

        def run(_: Any, loss: Any = loss) -> Any:
            return torch.autograd.grad(loss(hidden, weight), (hidden, weight))

        cases.append(Case(name=names[1], way=way, run=run, is_baseline=True))
    return cases
