"""The static linear map in float8, beside the one in bf16 that it stands for."""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels import CurrentScaling, fp8_linear, fp8_linear_pair, fp8_weight, linear, linear_pair
from ttt_megatron.bench.case import OURS, Case, Group, Missing

BF16 = "ttt_kernels in bf16"


def static_group(
    tokens: int, inputs: int, outputs: int, rowwise: bool, device: torch.device, rounds: int
) -> Group:
    """Forwards and backwards, weights' gradients included, on tensors and on pairs.

    The weight is rounded once a step, so that it is a case of its own; tokens and gradients are
    rounded within the others.
    """
    slow = 5e-10 if device.type == "cpu" else 1e-14
    return Group(
        section="kernels",
        operation=f"static linear map, scales by {'row' if rowwise else 'tensor'}",
        shape=f"{tokens:,} x {inputs:,} to {outputs:,}",
        precision="fp8",
        build=lambda: _cases(tokens, inputs, outputs, CurrentScaling(rowwise=rowwise), device),
        seconds=2.0 * tokens * inputs * outputs * 18 * slow,
        rounds=rounds,
    )


def _cases(
    tokens: int, inputs: int, outputs: int, scaling: CurrentScaling, device: torch.device
) -> list[Case | Missing]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    x, pair = draw(1, tokens, inputs), draw(2, 1, tokens, inputs)
    d_out, d_pair = draw(1, tokens, outputs).detach(), draw(2, 1, tokens, outputs).detach()
    weight = torch.randn(outputs, inputs, device=device, requires_grad=True)
    rounded = fp8_weight(weight, scaling)
    again = device.type == "cuda"
    functions: dict[str, tuple[Any, Any]] = {
        OURS: (
            lambda: fp8_linear(x, weight, scaling, rounded),
            lambda: fp8_linear_pair(pair, weight, scaling, rounded),
        ),
        BF16: (lambda: linear(x, weight), lambda: linear_pair(pair, weight)),
    }
    cases: list[Case | Missing] = [
        Case(name="weight rounded", run=lambda _: fp8_weight(weight, scaling), replayable=again)
    ]
    for way, (first, second) in functions.items():
        for prefix, function, of, cotangent in (
            ("", first, x, d_out),
            ("pair ", second, pair, d_pair),
        ):

            def forward(_: Any, function: Any = function) -> Tensor:
                with torch.no_grad():
                    result: Tensor = function()
                return result

            def backward(out: Tensor, of: Tensor = of, cotangent: Tensor = cotangent) -> Any:
                return torch.autograd.grad(out, (of, weight), cotangent, retain_graph=again)

            common: dict[str, Any] = {"way": way, "replayable": again}
            cases.append(Case(name=f"{prefix}forward", run=forward, **common))
            cases.append(Case(name=f"{prefix}backward", run=backward, prepare=function, **common))
    return cases
