"""Counts the bytes of live tensors, by watching every operation's results come and go."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within this context, knows the storages made by operations and which still live."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._peaks: list[int] = []
        self._bytes = 0
        self._since_sweep = 0

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

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known[0].expired():
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._bytes += storage.nbytes()

    def now(self) -> int:
        """Bytes live now."""
        self._storages = {
            key: (reference, size)
            for key, (reference, size) in self._storages.items()
            if not reference.expired()
        }
        self._bytes = sum(size for _, size in self._storages.values())
        self._peaks = [max(peak, self._bytes) for peak in self._peaks]
        # what was added since the last sweep may be dead already: look again when it could matter
        self._since_sweep = min(self._peaks, default=self._bytes)
        return self._bytes

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


def tensor_bytes(*values: Any) -> int:
    """Bytes of the distinct storages of all tensors found in nested values."""
    storages = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(values)
        if isinstance(leaf, torch.Tensor)
    }
    return sum(storages.values())
