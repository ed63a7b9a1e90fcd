"""RMSNorm, SwiGLU and RoPE: each forwards and backwards, on tensors and on pairs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_kernels import rms_norm, rms_norm_pair, rope, rotations, swiglu, swiglu_pair
from ttt_kernels.rms_norm.work import rms_norm_work
from ttt_kernels.rope.work import rope_work
from ttt_kernels.swiglu.reference import swiglu_reference
from ttt_kernels.swiglu.work import swiglu_work
from ttt_kernels.work import Work
from ttt_megatron.bench.baselines import DTYPES, compiled
from ttt_megatron.bench.case import OURS, Case, Group, Missing

EPS = 1e-6
Function = Callable[[Tensor], Tensor]


def row_groups(
    tokens: int, width: int, ffn: int, heads: int, precision: str, device: torch.device, rounds: int
) -> list[Group]:
    """One chunk's rows."""
    dtype = DTYPES[precision]
    head_dim = width // heads
    builders = {
        ("RMSNorm", f"{tokens:,} x {width:,}"): lambda: _norm(tokens, width, dtype, device),
        ("SwiGLU", f"{tokens:,} x {ffn:,}"): lambda: _swiglu(tokens, ffn, dtype, device),
        ("RoPE", f"{tokens:,} x {heads} heads of {head_dim}"): lambda: _rope(
            tokens, heads, head_dim, dtype, device
        ),
    }
    seconds = tokens * width * (1e-8 if device.type == "cpu" else 1e-10)
    return [
        Group(
            section="kernels",
            operation=operation,
            shape=shape,
            precision=precision,
            build=build,
            rounds=rounds,
            seconds=seconds,
        )
        for (operation, shape), build in builders.items()
    ]


def _both(
    functions: dict[str, Function],
    x: Tensor,
    work: Callable[[str], Work],
    prefix: str = "",
    inputs: tuple[Tensor, ...] = (),
) -> list[Case | Missing]:
    """Forward and backward of the same function, by whoever computes it."""
    again = x.is_cuda
    cases: list[Case | Missing] = []
    for way, function in functions.items():

        def forward(_: Any, function: Function = function) -> Tensor:
            with torch.no_grad():
                return function(x)

        def prepare(function: Function = function) -> tuple[Tensor, Tensor]:
            out = function(x)
            return out, torch.randn_like(out)

        def backward(state: tuple[Tensor, Tensor]) -> Any:
            return torch.autograd.grad(state[0], (x, *inputs), state[1], retain_graph=again)

        for name, run, ready in (
            (f"{prefix}forward", forward, lambda: None),
            (f"{prefix}backward", backward, prepare),
        ):
            counted = work(name.replace(" ", "_")) if way == OURS else None
            cases.append(
                Case(
                    name=name,
                    way=way,
                    run=run,
                    prepare=ready,
                    work=counted,
                    replayable=again,
                    is_baseline=way != OURS,
                )
            )
    return cases


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


def _with_compiled(functions: dict[str, Function], plain: Function, device: Any) -> dict:
    return {**functions, "torch.compile": compiled(plain)} if device.type == "cuda" else functions


def _norm(
    tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> list[Case | Missing]:
    x = _leaf(1, tokens, width, dtype=dtype, device=device)
    pair = _leaf(2, 1, tokens, width, dtype=dtype, device=device)
    gain = torch.ones(
        width, device=device, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True
    )

    def work(kernel: str) -> Work:
        return rms_norm_work(kernel, rows=tokens, width=width, element_size=dtype.itemsize)

    def by_torch(y: Tensor) -> Tensor:
        return F.rms_norm(y, (width,), gain.to(y.dtype), EPS)

    functions: dict[str, Function] = {OURS: lambda y: rms_norm(y, gain, EPS)}
    functions["F.rms_norm"] = by_torch
    functions = _with_compiled(functions, by_torch, device)
    of_pair: dict[str, Function] = {OURS: lambda y: rms_norm_pair(y, gain, EPS)}
    return _both(functions, x, work, inputs=(gain,)) + _both(
        of_pair, pair, work, "pair ", inputs=(gain,)
    )


def _swiglu(
    tokens: int, ffn: int, dtype: torch.dtype, device: torch.device
) -> list[Case | Missing]:
    x = _leaf(1, tokens, 2 * ffn, dtype=dtype, device=device)
    pair = _leaf(2, 1, tokens, 2 * ffn, dtype=dtype, device=device)

    def work(kernel: str) -> Work:
        return swiglu_work(kernel, rows=tokens, width=ffn, element_size=dtype.itemsize)

    functions: dict[str, Function] = {OURS: swiglu, "plain PyTorch": swiglu_reference}
    functions = _with_compiled(functions, swiglu_reference, device)
    return _both(functions, x, work) + _both({OURS: swiglu_pair}, pair, work, "pair ")


def _rope(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[Case | Missing]:
    x = _leaf(1, tokens, heads, head_dim, dtype=dtype, device=device)
    pair = _leaf(2, 1, tokens, heads, head_dim, dtype=dtype, device=device)
    turns = rotations(0, tokens, head_dim, 500_000.0, x)

    def work(kernel: str) -> Work:
        copies = 2 if "pair" in kernel else 1
        return rope_work(
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            copies=copies,
            element_size=dtype.itemsize,
        )

    turn: dict[str, Function] = {OURS: lambda y: rope(y, turns)}
    return _both(turn, x, work) + _both(turn, pair, work, "pair ")
