"""Gradients of static weights formed after a backward pass instead of within it.

Other processes wait for what a backward pass hands on, none for dW = dyᵀx. Within `putting_off`
the backward passes of static linear maps and of the output head leave that product out and queue
its factors; `WeightGradients.form` does the products later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ttt_kernels.mode import uses_plain_definitions


class OtherProduct(Protocol):
    """A share of a weight's gradient [out, in] from factors in a format of their own."""

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""

    def form(self, dtype: torch.dtype) -> Tensor:
        """The share."""


@dataclass(frozen=True)
class _Product:
    """weight's gradient grows by scale · dyᵀx."""

    weight: Tensor
    dy: Tensor
    x: Tensor
    scale: Tensor | None


class WeightGradients:
    """Products put off, and stand-ins whose gradients belong to other weights.

    Holds the factors of every product until `form`, which adds to `main_grad` of a weight that
    has one (megatron-core's gradient buffer), else to its `grad`. Hooks on the weights do not
    run.
    """

    def __init__(self) -> None:
        self._products: list[_Product] = []
        self._others: list[tuple[Tensor, OtherProduct]] = []
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self._formed = False

    @property
    def pending(self) -> int:
        """Products not formed yet."""
        return len(self._products) + len(self._others)

    @property
    def nbytes(self) -> int:
        """Bytes of the products' factors."""
        others = sum(product.nbytes for _, product in self._others)
        return others + sum(p.dy.nbytes + p.x.nbytes for p in self._products)

    def stand_in(self, weight: Tensor) -> Tensor:
        """A leaf with the weight's values; whatever gradient it gets becomes the weight's."""
        leaf = weight.detach().requires_grad_()
        self._stand_ins[id(leaf)] = leaf, weight
        return leaf

    def add(self, weight: Tensor, dy: Tensor, x: Tensor, scale: Tensor | None = None) -> None:
        """Queue scale · dyᵀx for a weight [out, in] or its stand-in; dy [n, out], x [n, in].

        Raises RuntimeError after `form`: nobody would ever form this product.
        """
        self._products.append(_Product(self._owner(weight), dy, x, scale))

    def add_product(self, weight: Tensor, product: OtherProduct) -> None:
        """The same for a product of another kind."""
        self._others.append((self._owner(weight), product))

    def _owner(self, weight: Tensor) -> Tensor:
        if self._formed:
            raise RuntimeError("a weight's gradient was put off after those put off were formed")
        _, owner = self._stand_ins.get(id(weight), (weight, weight))
        return owner

    @torch.no_grad()
    def form(self) -> None:
        """Do all products, each once, and free their factors one by one."""
        self._formed = True
        while self._products:
            one = self._products.pop()
            total = _total(one.weight)
            if one.scale is None and total.dtype == one.dy.dtype:
                total.addmm_(one.dy.mT, one.x)
                continue
            product = torch.mm(one.dy.mT, one.x).to(total.dtype)
            total.add_(product if one.scale is None else product.mul_(one.scale))
        while self._others:
            weight, other = self._others.pop()
            total = _total(weight)
            total.add_(other.form(total.dtype))
        for leaf, owner in self._stand_ins.values():
            if leaf.grad is not None:
                _total(owner).add_(leaf.grad)
        self._stand_ins.clear()


def _total(weight: Tensor) -> Tensor:
    """Where the gradients of a weight are summed."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is not None:
        return main_grad
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@dataclass(frozen=True)
class Receiver:
    """Where one operation's backward pass leaves its weight's product."""

    gradients: WeightGradients
    weight: Tensor

    def add(self, dy: Tensor, x: Tensor, scale: Tensor | None = None) -> None:
        """As `WeightGradients.add`."""
        self.gradients.add(self.weight, dy, x, scale)

    def add_product(self, product: OtherProduct) -> None:
        """As `WeightGradients.add_product`."""
        self.gradients.add_product(self.weight, product)


# Of the whole process: autograd runs backward passes, and checkpointing runs forward passes within
# them, on threads of its own, which see no context of the thread that asked for them.
_current: WeightGradients | None = None


@contextmanager
def putting_off(gradients: WeightGradients | None) -> Iterator[None]:
    """Operations called within this context, by any thread, put their weights' gradients off.

    With None they do not. What counts is where an operation is called, not where its backward
    pass runs; only one that is called again for the backward pass (checkpointing) must be in the
    context both times.
    """
    global _current
    before, _current = _current, gradients
    try:
        yield
    finally:
        _current = before


def weight_gradients() -> WeightGradients | None:
    """Where gradients are put off to at the moment, if they are."""
    return _current


def receiver(x: Tensor, weight: Tensor) -> Receiver | None:
    """For an operation's weight: where its gradient is put off to, or None if autograd forms it.

    The operation then takes the weight detached; its backward pass runs for x alone, so that an x
    without a gradient leaves the weight's to autograd.
    """
    if _current is None or not (torch.is_grad_enabled() and x.requires_grad):
        return None
    if not weight.requires_grad or uses_plain_definitions():
        return None
    return Receiver(_current, weight)
