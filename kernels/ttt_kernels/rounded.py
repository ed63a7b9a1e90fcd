"""Weights rounded to the products' dtype once, for all products of a pass.

A product of float32 weights with bfloat16 activations rounds the weights first. Rounding reads and
writes 6 bytes a weight, as much as the product of a thousand tokens reads and computes in a good
part of its time, and a pass multiplies by the same weights chunk after chunk.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

_active: ContextVar[tuple["RoundedWeights", ...]] = ContextVar("rounded_weights", default=())


class _Copy(NamedTuple):
    """The source is held so that no other tensor can come to lie where it does."""

    source: Tensor
    version: int
    rounded: Tensor


class RoundedWeights:
    """Copies of weights that products read instead of rounding the weights; see `using`."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], _Copy] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.rounded.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def renew(self, weights: Iterable[Tensor], dtype: torch.dtype) -> None:
        """Round these weights [..., out, in] as they now are, and no others.

        Those that have the dtype already need no copy. A copy whose weight lies where it did is
        overwritten in place, so that what reads it by its address goes on to read it.
        """
        copies: dict[tuple[Any, ...], _Copy] = {}
        for weight in weights:
            if weight.dtype == dtype or weight.dim() < 2:
                continue
            key, source = _key(weight, dtype), weight.detach()
            old = self._copies.get(key)
            rounded = torch.empty_like(source, dtype=dtype) if old is None else old.rounded
            copies[key] = _Copy(source, source._version, rounded)
        self._copies = copies
        if copies:
            # Not noted by autograd: where a graph still reads a copy, its weight is what it was.
            torch._foreach_copy_(
                [copy.rounded.data for copy in copies.values()],
                [copy.source for copy in copies.values()],
            )

    def find(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copy of this weight, if there is one.

        Raises RuntimeError if the weight has been changed since, as far as its version tells.
        """
        copy = self._copies.get(_key(weight, dtype))
        if copy is None:
            return None
        if copy.source._version != copy.version:
            raise RuntimeError(
                f"a weight {list(weight.shape)} was changed after it was rounded to {dtype}: round"
                " it again (RoundedWeights.renew) before products read it."
            )
        return copy.rounded


def _key(weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    place = weight.data_ptr(), weight.device, weight.dtype
    return *place, tuple(weight.shape), weight.stride(), dtype


@contextmanager
def using(weights: RoundedWeights) -> Iterator[None]:
    """Within, products that form no gradient through the rounding read these copies.

    Contexts may be nested; the innermost that has a copy counts.
    """
    token = _active.set((weights, *_active.get()))
    try:
        yield
    finally:
        _active.reset(token)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype: itself, a copy in use, or one made now.

    Where autograd is to see the weight through the copy, one is made now.
    """
    if weight.dtype != dtype and not (weight.requires_grad and torch.is_grad_enabled()):
        for weights in _active.get():
            found = weights.find(weight, dtype)
            if found is not None:
                return found
    return weight.to(dtype)
