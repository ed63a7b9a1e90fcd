"""The arrays of a Hugging Face model folder, in one safetensors file or several."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt_megatron.errors import UserError

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32", "F16", "BF16"}


class SafetensorsFolder:
    """Arrays by name; their shapes are known, their values are read one at a time.

    Raises UserError if a file is missing, damaged or of another dtype.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path, names in _files(folder).items():
            for name, (shape, dtype) in _headers(path).items():
                if dtype not in _DTYPES:
                    raise UserError(
                        f"{path}: array {name} is stored as {dtype}, and float32, float16 or "
                        f"bfloat16 is imported; save the model in one of them"
                    )
                self._files[name], self._shapes[name] = path, shape
            lacking = sorted(names - self._files.keys())
            if lacking:
                raise UserError(
                    f"{path} has no array {lacking[0]}, which {_INDEX} says it has: copy the "
                    f"model again"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every array's shape."""
        return dict(self._shapes)

    def read(self, name: str) -> Tensor:
        """A whole array as float32, exactly; UserError if it is not finite."""
        path = self._files[name]
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name).to(torch.float32)
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: array {name} has entries that are not finite; save the model again"
            )
        return tensor


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files, and the arrays that the index says they have."""
    if not (folder / _INDEX).is_file():
        if not (folder / _ONE).is_file():
            raise UserError(
                f"{folder} holds neither {_ONE} nor {_INDEX}: save the model with transformers' "
                f"save_pretrained"
            )
        return {folder / _ONE: set()}
    try:
        placed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {
            folder / file: {n for n, f in placed.items() if f == file}
            for file in set(placed.values())
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / _INDEX} cannot be read ({error!r}): copy the model again"
        ) from None
    for path in sorted(files):
        if not path.is_file():
            raise UserError(f"{path} is missing, and {_INDEX} names it: copy the model again")
    return files


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no safetensors file, or damaged ({error}): copy the model again"
        ) from None
