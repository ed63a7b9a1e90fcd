"""Counts what a process sends through torch.distributed, for checks against formulas."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = ("allreduce", "allgather", "reduce_scatter")


@dataclass
class Traffic:
    """Collectives of one process by kind (`allreduce`, `allgather`, `reduce_scatter`, `send`, …).

    `calls` and `elements`, where a collective's elements are those of the whole tensor: the one
    reduced, gathered, or to be scattered. Groups of one process send nothing and are left out.
    """

    calls: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)


class _Listener(TorchDispatchMode):
    """Sees every collective, whichever function or library started it, backward passes included."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d" and _group_size(func, args) > 1:
            name = func._schema.name.removeprefix("c10d::").strip("_")
            kind = next((known for known in _KINDS if name.startswith(known)), name)
            self._traffic.calls[kind] += 1
            # Inputs and outputs both: the whole tensor is the larger, as one or as a list.
            sizes = [
                sum(leaf.numel() for leaf in tree_leaves(arg) if isinstance(leaf, Tensor))
                for arg in args
            ]
            self._traffic.elements[kind] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def _group_size(func: Any, args: tuple[Any, ...]) -> int:
    """Processes in the group that a c10d operation is called on."""
    [group] = [
        arg
        for parameter, arg in zip(func._schema.arguments, args, strict=False)
        if parameter.name == "process_group"
    ]
    return ProcessGroup.unbox(group).size()


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts the collectives that this process starts within, on its thread and in its backward."""
    traffic = Traffic()
    with _Listener(traffic):
        yield traffic


def bytes_on_the_wire(traffic: Traffic, size: int, itemsize: int) -> float:
    """Bytes a rank sends under ring algorithms in groups of `size` ranks."""
    once = (size - 1) / size * itemsize
    elements = traffic.elements
    # A reduction is a scattering of sums and a gathering of them.
    return once * (elements.total() + elements["allreduce"])
