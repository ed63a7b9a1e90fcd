"""The arrays of an official checkpoint's `model_weights`, read with TensorStore.

An OCDBT database of zarr 2 arrays. Reading it so needs none of the devices it was saved from, which
Orbax's own restoring without a target asks for.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_megatron.errors import UserError

MANIFEST = "manifest.ocdbt"
_ARRAY = "/.zarray"
_PROCESS = re.compile(r"(?:ocdbt\.)?process_(\d+)")
_DTYPES = ("float32", "bfloat16")


class OfficialStore:
    """An opened `model_weights` folder.

    Raises UserError if TensorStore is not installed, or the folder's index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorstore
        except ImportError:
            raise UserError(
                "importing an official checkpoint needs TensorStore, which is not installed: "
                "pip install 'ttt-megatron[import]'"
            ) from None
        self.folder = folder
        self._library: Any = tensorstore
        # Absolute, with its slash: TensorStore takes a folder by its URL alone.
        self._database = {"driver": "ocdbt", "base": folder.resolve().as_uri() + "/"}
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder / MANIFEST} is missing: {_COPY}")
        self._arrays: dict[str, Any] = {}
        try:
            keys = tensorstore.KvStore.open(self._database).result().list().result()
        except ValueError as error:
            raise self._damage("its list of arrays", error) from None
        names = [key.decode() for key in keys]
        self.names = sorted(n.removesuffix(_ARRAY) for n in names if n.endswith(_ARRAY))

    def _open(self, name: str) -> Any:
        if name not in self._arrays:
            # A chunk that is missing would otherwise be read as zeros.
            spec = {
                "driver": "zarr",
                "kvstore": {**self._database, "path": f"{name}/"},
                "fill_missing_data_reads": False,
            }
            try:
                self._arrays[name] = self._library.open(spec, open=True, read=True).result()
            except ValueError as error:
                raise self._damage(f"array {name}", error) from None
        return self._arrays[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """An array's shape; UserError if its description cannot be read."""
        return tuple(self._open(name).shape)

    def dtype(self, name: str) -> str:
        """An array's stored dtype; UserError for one that is not imported."""
        dtype: str = self._open(name).dtype.name
        if dtype not in _DTYPES:
            raise UserError(
                f"{self.folder}: array {name} is stored as {dtype}, and float32 (or bfloat16) is "
                f"imported; convert it first"
            )
        return dtype

    def read(self, name: str) -> Tensor:
        """A whole array as float32, exactly; UserError if any part of it cannot be read."""
        self.dtype(name)
        try:
            values: np.ndarray = self._open(name).read().result()
        except ValueError as error:
            raise self._damage(f"array {name}", error) from None
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        if not tensor.isfinite().all():
            raise UserError(
                f"{self.folder}: array {name} has entries that are not finite; use another step"
            )
        return tensor

    def _damage(self, what: str, error: ValueError) -> UserError:
        missing = self._missing_parts()
        if missing:
            return UserError(
                f"{self.folder}: {what} cannot be read, as {missing[0]} is missing: {_COPY}"
            )
        # Behind the first bracket with an equals sign come TensorStore's own annotations.
        reason = re.split(r" \[\w+=", str(error).splitlines()[0])[0]
        return UserError(
            f"{self.folder}: {what} cannot be read, as a file is missing or damaged ({reason}): "
            f"{_COPY}"
        )

    def _missing_parts(self) -> list[str]:
        """Folders of processes that wrote and whose data is not there."""
        present = _numbers(self.folder)
        wrote = _numbers(self.folder / "array_metadatas")
        expected = wrote | set(range(max(present, default=-1) + 1))
        return [f"ocdbt.process_{number}" for number in sorted(expected - present)]


def _numbers(folder: Path) -> set[int]:
    if not folder.is_dir():
        return set()
    found = (_PROCESS.fullmatch(path.name) for path in folder.iterdir())
    return {int(match[1]) for match in found if match}


_COPY = "copy the checkpoint again, whole"
