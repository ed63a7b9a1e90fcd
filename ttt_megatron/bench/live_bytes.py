"""Counts the bytes of live tensors, by watching every operation's results come and go."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"
STRIDE = 0.002
"""Share of the bytes by which `highest` may be exceeded unseen: looking takes time."""


class LiveBytes(TorchDispatchMode):
    """Within this context, knows the storages made by operations and which still live.

    A storage is of the kind named by the innermost `of_kind` it was made in, or of that given to
    it by `assign`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._peaks: list[int] = []
        self._highest: list[Counter[str]] = []
        self._bytes = 0
        self._since_sweep = 0
        self._kind = OTHER

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if self._bytes > self._since_sweep:
            self.now()
        return out

    def _add(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known[0].expired():
            entry = StorageWeakRef(storage), storage.nbytes(), kind or self._kind
            self._storages[storage._cdata] = entry
            self._bytes += storage.nbytes()
        elif kind is not None:
            self._storages[storage._cdata] = (known[0], known[1], kind)

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """What is made within is of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def assign(self, kind: str, *values: Any) -> None:
        """All tensors found in nested values are of this kind from now on."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._add(leaf, kind)

    def now(self) -> int:
        """Bytes live now."""
        self._storages = {
            key: known for key, known in self._storages.items() if not known[0].expired()
        }
        self._bytes = sum(size for _, size, _ in self._storages.values())
        self._peaks = [max(peak, self._bytes) for peak in self._peaks]
        for highest in self._highest:
            if self._bytes > highest.total():
                highest.clear()
                highest.update(self.by_kind())
        # what was added since the last sweep may be dead already: look again when it could matter
        marks = [*self._peaks, *(int(h.total() * (1 + STRIDE)) for h in self._highest)]
        self._since_sweep = min(marks, default=self._bytes)
        return self._bytes

    def by_kind(self) -> Counter[str]:
        """Bytes by kind, as of the last look."""
        found: Counter[str] = Counter()
        for _, size, kind in self._storages.values():
            found[kind] += size
        return found

    @contextmanager
    def peak_above_start(self, results: list[int]) -> Iterator[None]:
        """Appends the highest number of bytes above the number at entry."""
        start = self.now()
        self._peaks.append(start)
        self._since_sweep = start
        try:
            yield
        finally:
            self.now()
            results.append(self._peaks.pop() - start)

    @contextmanager
    def highest(self) -> Iterator[Counter[str]]:
        """Yields what will hold, once left, the bytes by kind when most were live."""
        found: Counter[str] = Counter()
        self._highest.append(found)
        self.now()
        try:
            yield found
        finally:
            self.now()
            # by identity: equal ones may be watched one inside the other
            self._highest = [other for other in self._highest if other is not found]


def tensor_bytes(*values: Any) -> int:
    """Bytes of the distinct storages of all tensors found in nested values."""
    storages = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(values)
        if isinstance(leaf, torch.Tensor)
    }
    return sum(storages.values())
