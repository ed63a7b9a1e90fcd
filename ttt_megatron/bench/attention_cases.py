"""Attention: the four passes of a meta step, and attention differentiated twice, with baselines."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import swa_attention, swa_attention_pair
from ttt_kernels.swa_attention.reference import swa_attention_reference
from ttt_kernels.swa_attention.work import visible_pairs
from ttt_kernels.work import Work
from ttt_megatron.bench import baselines
from ttt_megatron.bench.attention_shape import AttentionShape
from ttt_megatron.bench.case import OURS, Case, Group, Missing


@dataclass
class _Tensors:
    """Inputs as the model makes them, [b, T, n, d]; pairs are [2, b, T, n, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    pairs: tuple[Tensor, Tensor, Tensor]
    d_pair: Tensor
    past: tuple[Tensor, Tensor] | tuple[None, None]

    @classmethod
    def draw(cls, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> "_Tensors":
        def normal(length: int, *leading: int) -> Tensor:
            size = (*leading, 1, length, shape.heads, shape.head_dim)
            return torch.randn(size, device=device, dtype=dtype)

        q, k, v = (normal(shape.length).requires_grad_() for _ in range(3))
        pairs = tuple(normal(shape.length, 2).requires_grad_() for _ in range(3))
        past = (normal(shape.past), normal(shape.past)) if shape.past else (None, None)
        d_out, d_pair = normal(shape.length), normal(shape.length, 2)
        return cls(q, k, v, d_out, pairs, d_pair, past)  # type: ignore[arg-type]


def attention_groups(
    shapes: list[AttentionShape], precision: str, device: torch.device, rounds: int
) -> list[Group]:
    """Groups `attention` (each pass by itself) and `attention, twice` of every shape."""
    dtype = baselines.DTYPES[precision]
    groups = []
    for shape in shapes:
        pairs = sum(visible_pairs(shape.length, shape.window, shape.past))
        seconds = pairs * shape.heads * shape.head_dim * 2e-11 * (30 if device.type == "cpu" else 1)
        scores = 4.0 * shape.heads * shape.length * (shape.length + shape.past)
        common: dict[str, Any] = {
            "section": "kernels",
            "shape": str(shape),
            "precision": precision,
            "rounds": rounds,
            "seconds": seconds,
        }
        groups.append(
            Group(
                operation="attention",
                build=lambda s=shape: _passes(s, dtype, device),  # type: ignore[misc]
                **common,
            )
        )
        if shape.past or shape.length <= 4096:
            # Plain attention differentiated twice keeps a dozen matrices of scores.
            groups.append(
                Group(
                    operation="attention, differentiated twice",
                    build=lambda s=shape: _twice(s, dtype, device),  # type: ignore[misc]
                    memory_bytes=14 * scores,
                    **common,
                )
            )
    return groups


def _passes(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> list[Case | Missing]:
    x, again = _Tensors.draw(shape, dtype, device), device.type == "cuda"

    def attend() -> Tensor:
        return swa_attention(x.q, x.k, x.v, shape.window, *x.past)

    def attend_pair() -> Tensor:
        return swa_attention_pair(*x.pairs, shape.window, *x.past)

    ours = [
        *_pass_of("forward", "inner backward", attend, (x.q, x.k, x.v), x.d_out, again),
        *_pass_of("pair forward", "pair backward", attend_pair, x.pairs, x.d_pair, again),
    ]
    cases: list[Case | Missing] = [
        replace(case, work=shape.work(case.name.replace(" ", "_"), dtype)) for case in ours
    ]
    for way, function in baselines.first_order(shape, x.past, dtype, device).items():
        if isinstance(function, str):
            cases.append(Missing(name="forward", way=way, reason=function))
            continue

        def run(function: Any = function) -> Tensor:
            result: Tensor = function(x.q, x.k, x.v)
            return result

        cases += _pass_of(
            "forward", "inner backward", run, (x.q, x.k, x.v), x.d_out, again, way=way
        )
    return cases


def _pass_of(
    forward: str,
    backward: str,
    attend: Callable[[], Tensor],
    inputs: tuple[Tensor, ...],
    cotangent: Tensor,
    again: bool,
    way: str = OURS,
) -> list[Case]:
    common: dict[str, Any] = {"way": way, "is_baseline": way != OURS, "replayable": again}

    def run_forward(_: Any) -> Tensor:
        with torch.no_grad():
            return attend()

    def run_backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=again)

    return [
        Case(name=forward, run=run_forward, **common),
        Case(name=backward, run=run_backward, prepare=attend, **common),
    ]


def _twice(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> list[Case | Missing]:
    x = _Tensors.draw(shape, dtype, device)
    d_out = x.d_out.clone().requires_grad_()
    seeds = [torch.randn_like(x.q) for _ in range(3)]

    def differentiate(attend: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        inputs = (x.q, x.k, x.v)
        grads = torch.autograd.grad(attend(), inputs, d_out, create_graph=True)
        return torch.autograd.grad(grads, (*inputs, d_out), seeds)

    def ours() -> Tensor:
        return swa_attention(x.q, x.k, x.v, shape.window, *x.past)

    def plain() -> Tensor:
        return swa_attention_reference(x.q, x.k, x.v, shape.window, *x.past)

    def math() -> Tensor:
        return baselines.sdpa_math(x.q, x.k, x.v, shape.window, *x.past)

    name = "forward, gradient, its gradient"
    passes = ("forward", "inner_backward", "pair_forward_saved", "pair_backward_known")
    works = [shape.work(kernel, dtype) for kernel in passes]
    work = Work(sum(w.flops for w in works), sum(w.bytes for w in works))
    cases: list[Case | Missing] = [
        Case(name=name, run=lambda _: differentiate(ours), work=work),
        Case(name=name, way="SDPA math", run=lambda _: differentiate(math), is_baseline=True),
        Case(name=name, way="plain PyTorch", run=lambda _: differentiate(plain), is_baseline=True),
    ]
    if device.type == "cuda":
        compiled = baselines.compiled(swa_attention_reference)

        def by_compiler() -> Tensor:
            result: Tensor = compiled(x.q, x.k, x.v, shape.window, *x.past)
            return result

        run = lambda _: differentiate(by_compiler)  # noqa: E731
        cases.append(Case(name=name, way="torch.compile", run=run, is_baseline=True))
    return cases
