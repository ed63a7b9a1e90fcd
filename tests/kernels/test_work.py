"""Least work of the operations, against FLOPs and tensors of the operations themselves."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_kernels import (
    fast_linear,
    fast_linear_pair,
    linear_cross_entropy,
    linear_cross_entropy_pair,
)
from ttt_kernels.clipped_sgd.work import clipped_sgd_work
from ttt_kernels.fast_linear.work import fast_linear_work
from ttt_kernels.linear_cross_entropy.work import head_work
from ttt_kernels.rms_norm.work import rms_norm_work
from ttt_kernels.rope.work import rope_work
from ttt_kernels.swiglu.work import swiglu_work


def draw(*shape):
    return torch.randn(*shape, requires_grad=True)


class CountProducts(TorchDispatchMode):
    """FLOPs of matrix products; torch's own counter misses those that add in place."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[:2] if name in ("mm", "bmm") else args[1:3]
            self.flops += 2 * a.numel() * b.shape[-1]
        return function(*args, **(kwargs or {}))


def counted(function):
    with CountProducts() as products:
        result = function()
    return products.flops, result


def test_fast_linear_forms_the_products_counted():
    x, pair, weight, v = draw(3, 7, 5), draw(2, 3, 7, 5), draw(3, 6, 5), torch.randn(3, 6, 5)
    sizes = {"sequences": 3, "tokens": 7, "inputs": 5, "outputs": 6}
    kept = torch.randn(3, 7, 6), torch.randn(3, 7, 5)
    for prefix, known, run in (
        ("", False, lambda: fast_linear(x, weight)),
        ("pair_", False, lambda: fast_linear_pair(pair, weight, v)),
        ("pair_", True, lambda: fast_linear_pair(pair, weight, v, *kept)),
    ):
        flops, out = counted(run)
        assert flops == fast_linear_work(f"{prefix}forward", known=known, **sizes).flops
        flops, _ = counted(out.sum().backward)
        assert flops == fast_linear_work(f"{prefix}backward", known=known, **sizes).flops


def test_head_forms_the_products_counted():
    hidden, pair, weight = draw(7, 5), draw(2, 7, 5), draw(11, 5)
    targets, a = torch.randint(11, (7,)), torch.rand(7)
    fixed = weight.detach()
    for kernel, run in {
        "loss": lambda: linear_cross_entropy(hidden.detach(), fixed, targets, a)[0],
        "hidden": lambda: linear_cross_entropy(hidden, fixed, targets, a)[0],
        "full": lambda: linear_cross_entropy(hidden, weight, targets, a)[0],
        "pair": lambda: linear_cross_entropy_pair(pair, weight, targets, a, a),
        "pair_known": lambda: linear_cross_entropy_pair(
            pair, weight, targets, a, a, torch.randn(7, 5)
        ),
    }.items():

        def both_passes(run=run):
            loss = run()
            if loss.requires_grad:
                loss.backward()

        flops, _ = counted(both_passes)
        assert flops == head_work(kernel, tokens=7, vocabulary=11, width=5).flops, kernel


def test_bytes_by_hand():
    norm = {"rows": 10, "width": 6}
    assert rms_norm_work("forward", **norm) == (0, 2 * 60 * 2 + 4 * 10 + 4 * 6)
    assert rms_norm_work("pair_backward", **norm) == (0, 6 * 60 * 2 + 4 * 20 + 4 * 12)
    # gate, up, dy in; dgate, dup out
    assert swiglu_work("backward", rows=10, width=6, element_size=4).bytes == 5 * 60 * 4
    assert swiglu_work("pair_forward", rows=10, width=6).bytes == 6 * 60 * 2
    assert rope_work(tokens=8, heads=3, head_dim=4, copies=2).bytes == 2 * 192 * 2 + 4 * 32
    assert clipped_sgd_work("step", weights=100, sequences=2).bytes == 2 * 100 * 12
    assert clipped_sgd_work("norm", weights=100, gradient_size=2).bytes == 200
    assert head_work("hidden", tokens=7, vocabulary=11, width=5).bytes == 2 * 35 * 2 + 4 * 55
    sizes = {"sequences": 3, "tokens": 7, "inputs": 5, "outputs": 6}
    # ȳ, ẏ̄ and x, ẋ in, x̄ and ẋ̄ out; W and v in, W̄ out
    expected = 3 * (7 * (4 * 5 + 2 * 6) * 2 + 4 * 3 * 30)
    assert fast_linear_work("pair_backward", **sizes).bytes == expected


@pytest.mark.parametrize("work", [rms_norm_work, swiglu_work])
def test_another_kernel_is_refused(work):
    with pytest.raises(KeyError):
        work("sideways", rows=1, width=2)
