"""Clipped SGD over all fast weights of a sequence, and the products with them."""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels import (
    add_scaled_,
    clip_factor,
    fast_linear,
    fast_linear_pair,
    scaled_differences,
    sequence_products,
)
from ttt_kernels.clipped_sgd.work import clipped_sgd_work
from ttt_kernels.fast_linear.work import fast_linear_work
from ttt_kernels.work import Work
from ttt_megatron.bench.baselines import DTYPES
from ttt_megatron.bench.case import OURS, Case, Group, Missing


def step_group(
    layers: int, width: int, ffn: int, precision: str, device: torch.device, rounds: int
) -> Group:
    """The inner step's arithmetic, and its adjoint; the weights are float32 (float64)."""
    number = 3 * layers * width * ffn
    slow = 4e-9 if device.type == "cpu" else 4e-11
    return Group(
        section="kernels",
        operation="clip and SGD",
        shape=f"{number / 1e6:,.1f}M fast weights",
        precision="fp64" if precision == "fp64" else "fp32",
        build=lambda: _steps(layers, width, ffn, precision, device),
        memory_bytes=4.0 * number * 5,
        seconds=number * slow,
        rounds=rounds,
    )


def product_group(
    tokens: int, width: int, ffn: int, precision: str, device: torch.device, rounds: int
) -> Group:
    """The wide product of a prime MLP."""
    slow = 1e-10 if device.type == "cpu" else 1e-14
    return Group(
        section="kernels",
        operation="linear map of fast weights",
        shape=f"{tokens:,} x {width:,} to {2 * ffn:,}",
        precision=precision,
        build=lambda: _products(tokens, width, 2 * ffn, DTYPES[precision], device),
        seconds=2.0 * tokens * width * 2 * ffn * 14 * slow,
        rounds=rounds,
    )


def _steps(
    layers: int, width: int, ffn: int, precision: str, device: torch.device
) -> list[Case | Missing]:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    shapes = [(1, 2 * ffn, width), (1, width, ffn)] * layers

    def draw() -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]

    weights, gradient, v = draw(), draw(), draw()
    small = torch.full((1,), 1e-6, dtype=dtype, device=device)
    number = sum(w.numel() for w in weights)
    again, size = device.type == "cuda", dtype.itemsize

    def work(*kernels: str) -> Work:
        each = [
            clipped_sgd_work(k, weights=number, weight_size=size, gradient_size=size)
            for k in kernels
        ]
        return Work(sum(w.flops for w in each), sum(w.bytes for w in each))

    def norm(_: Any) -> Tensor:
        return sequence_products(gradient, gradient).sqrt()

    def step(_: Any) -> None:
        # The rate is tiny, so that the weights stay finite however often it is taken.
        add_scaled_(weights, gradient, small * clip_factor(norm(None), 1.0), sign=-1)

    def adjoint(_: Any) -> list[Tensor]:
        return scaled_differences(v, small, gradient, small * sequence_products(gradient, v))

    def plain_norm(_: Any) -> Tensor:
        return torch.stack(torch._foreach_norm(gradient)).norm()

    def plain_step(_: Any) -> None:
        factor = (1.0 / plain_norm(None)).clamp(max=1.0) * -1e-6
        torch._foreach_add_(weights, torch._foreach_mul(gradient, factor))

    names = ("norm", "norm, clip and step", "adjoint of the step")
    foreach: dict[str, Any] = {
        "way": "torch._foreach",
        "is_baseline": True,
        "replayable": again,
    }
    return [
        Case(name=names[0], run=norm, work=work("norm"), replayable=again),
        Case(name=names[1], run=step, work=work("norm", "step"), replayable=again),
        Case(name=names[2], run=adjoint, work=work("product", "difference"), replayable=again),
        Case(name=names[0], run=plain_norm, **foreach),
        Case(name=names[1], run=plain_step, **foreach),
    ]


def _products(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> list[Case | Missing]:
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(1, tokens, inputs, dtype=dtype, device=device, requires_grad=True)
    pair = torch.randn(2, 1, tokens, inputs, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(1, outputs, inputs, dtype=wide, device=device, requires_grad=True)
    direction = torch.randn(1, outputs, inputs, dtype=wide, device=device)
    d_out = torch.randn(1, tokens, outputs, dtype=dtype, device=device)
    d_pair = torch.randn(2, 1, tokens, outputs, dtype=dtype, device=device)
    again = device.type == "cuda"

    def work(kernel: str) -> Work:
        return fast_linear_work(
            kernel,
            sequences=1,
            tokens=tokens,
            inputs=inputs,
            outputs=outputs,
            element_size=dtype.itemsize,
        )

    def first() -> Tensor:
        return fast_linear(x, weight)

    def second() -> Tensor:
        return fast_linear_pair(pair, weight, direction)

    def without_graph(function: Any) -> Any:
        with torch.no_grad():
            return function()

    def back(out: Tensor) -> Any:
        return torch.autograd.grad(out, (x, weight), d_out, retain_graph=again)

    def back_pair(out: Tensor) -> Any:
        return torch.autograd.grad(out, (pair, weight), d_pair, retain_graph=again)

    def case(name: str, run: Any, prepare: Any = lambda: None) -> Case:
        counted = work(name.replace(" ", "_"))
        return Case(name=name, way=OURS, run=run, prepare=prepare, work=counted, replayable=again)

    return [
        case("forward", lambda _: without_graph(first)),
        case("backward", back, first),
        case("pair forward", lambda _: without_graph(second)),
        case("pair backward", back_pair, second),
    ]
