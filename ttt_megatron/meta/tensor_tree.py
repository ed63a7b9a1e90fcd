"""Tensors inside lists, tuples, dictionaries and dataclasses."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

Tree = TypeVar("Tree")


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The same structure with `function` of every tensor in its place, in a fixed order."""
    return _map(function, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors, in that order."""
    found: list[Tensor] = []
    _map(found.append, tree)
    return found


def with_tensors(tree: Tree, tensors: list[Tensor]) -> Tree:
    """The same structure with other tensors, as `tensors_of` gives them."""
    others = iter(tensors)
    return map_tensors(lambda _: next(others), tree)


def structure(tree: Any) -> str:
    """A text that is equal for trees of the same structure, shapes, dtypes and devices alone."""
    return repr(map_tensors(lambda x: (tuple(x.shape), x.dtype, x.device), tree))


def _map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_map(function, value) for value in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: _map(function, getattr(tree, f.name)) for f in fields(tree)}
        return replace(tree, **values)
    return tree
