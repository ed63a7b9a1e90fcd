"""Kernels for the recurrences, tried against their definitions before they are used."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ttt_megatron.baselines.gated_delta_rule import DeltaRule, gated_delta_rule_reference
from ttt_megatron.baselines.state_space import StateSpace, state_space_reference

Recurrence = Callable[..., tuple[Tensor, Tensor]]

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest differences of a trial, relative to the largest entry, by the products' dtype."""

_CASES = ((1, True), (70, False), (70, True))
"""Tokens of the trials, and whether a state comes before: one token that is decoded, and a full
chunk with one after it that is not full."""

_DECAYS = 3
"""Which argument of either recurrence the decays are."""

_NAMES = ("values", "a state", *(f"a gradient of argument {n}" for n in range(1, 7)))


class KernelMissingError(Exception):
    """Why the kernels are not to be had, in one clause."""


def try_state_space(
    scan: StateSpace, state_size: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises KernelMissingError if values or gradients differ from the definition's in float64."""
    for length, has_past in _CASES:
        draw = _Draws(length)
        c, b = draw.unit(state_size, heads=False), draw.unit(state_size, heads=False)
        arguments = [c, b, draw.normal(head_dim), draw.log_decay()]
        state = draw.state(state_size, head_dim) if has_past else None
        _compare(scan, state_space_reference, arguments, state, device, dtype)


def try_delta_rule(
    rule: DeltaRule, key_dim: int, value_dim: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises KernelMissingError if values or gradients differ from the definition's in float64."""
    for length, has_past in _CASES:
        draw = _Draws(length)
        q, k, v = draw.unit(key_dim), draw.unit(key_dim), draw.normal(value_dim)
        arguments = [q, k, v, draw.log_decay(), draw.share()]
        state = draw.state(key_dim, value_dim) if has_past else None
        _compare(rule, gated_delta_rule_reference, arguments, state, device, dtype)


class _Draws:
    """Inputs of a trial for two sequences of `length` tokens and three heads, float32."""

    def __init__(self, length: int) -> None:
        self._generator = torch.Generator().manual_seed(length)
        self._tokens = (2, length)

    def normal(self, width: int, heads: bool = True) -> Tensor:
        shape = (*self._tokens, 3, width) if heads else (*self._tokens, width)
        return torch.randn(shape, generator=self._generator)

    def unit(self, width: int, heads: bool = True) -> Tensor:
        return nn.functional.normalize(self.normal(width, heads), dim=-1)

    def share(self) -> Tensor:
        return torch.rand((*self._tokens, 3), generator=self._generator)

    def log_decay(self) -> Tensor:
        """From next to none to what forgets within a token."""
        return -4 * self.share() ** 4

    def state(self, rows: int, columns: int) -> Tensor:
        return torch.randn((2, 3, rows, columns), generator=self._generator)


def _compare(
    function: Recurrence,
    definition: Recurrence,
    arguments: list[Tensor],
    state: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    # Rounded beforehand, so that both see the same numbers; decays and state stay in float32.
    rounded = [x if n == _DECAYS else x.to(dtype).float() for n, x in enumerate(arguments)]
    given = [*rounded, state]
    exact = _values_and_gradients(definition, given, torch.float64, torch.device("cpu"))
    try:
        found = _values_and_gradients(function, given, torch.float32, device)
    except Exception as error:
        raise KernelMissingError(f"failed in a trial ({type(error).__name__}: {error})") from error
    for what, a, e in zip(_NAMES, found, exact, strict=False):
        if a.shape != e.shape:
            raise KernelMissingError(f"has {what} of the shape {list(a.shape)}")
        off = float((a.cpu().double() - e).abs().max() / e.abs().max())
        if not off <= BOUNDS[dtype]:
            raise KernelMissingError(f"has {what} {off:.1e} off the definition's")


def _values_and_gradients(
    function: Recurrence,
    arguments: list[Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Output, state after it, and gradients of both together with respect to all arguments."""
    leaves = [
        None if x is None else x.to(device, dtype).detach().clone().requires_grad_()
        for x in arguments
    ]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(results, wanted, cotangents)
    return [*(x.detach() for x in results), *gradients]
