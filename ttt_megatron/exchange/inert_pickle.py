"""Reading what torch.save left of another program, without running any of its code.

Tensors, plain values and argparse's Namespace come out as they are; objects of any other class
come out as an `Unknown` that holds nothing.
"""

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

_KNOWN = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, slice, complex, bytearray)},
}


class Unknown:
    """Stands for an object of a class that is not read."""

    def __init__(self, *values: Any, **named: Any) -> None:
        """Takes whatever the class took."""

    def __call__(self, *values: Any) -> "Unknown":
        """What a method of the object returned."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Forgets the object's state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forgets an item."""

    def append(self, value: Any) -> None:
        """Forgets an entry."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return getattr(torch if module == "torch" else torch.storage, name, Unknown)
        return Unknown


def _load(file: BinaryIO, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_MODULE = SimpleNamespace(
    __name__="inert_pickle",
    Unpickler=_Unpickler,
    load=_load,
    UnpicklingError=pickle.UnpicklingError,
)


def load_inert(path: Path) -> Any:
    """What the file holds, tensors on the CPU and read when they are used.

    Raises OSError, RuntimeError, ValueError, EOFError or pickle.UnpicklingError if it is damaged.
    """
    return torch.load(
        str(path), map_location="cpu", weights_only=False, pickle_module=_MODULE, mmap=True
    )
