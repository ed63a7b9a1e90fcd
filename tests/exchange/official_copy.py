"""Official checkpoints for tests: copies to be damaged, and ones written from given arrays."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore

from ttt_megatron.exchange.official_names import STORED_NAMES

FIXTURE = Path(__file__).parents[1] / "golden" / "official_checkpoint"
STEP = FIXTURE / "2500"
"""Written by the official implementation itself: two processes, arrays cut in two."""

EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
"""Shape, and SHA-256 of the float32 values, of each array, read from a save by one process."""

SETTINGS = (
    "model.window_size=20",
    "model.rope_theta=5e5",
    "model.norm_eps=1e-6",
    "inner.chunk_size=8",
    "inner.lr=0.5",
    "inner.clip=0.3",
)


def copy_to(folder: Path) -> Path:
    """A copy of the fixture's step that may be changed."""
    step = folder / "2500"
    shutil.copytree(STEP, step)
    return step


def database(weights: Path) -> dict:
    """TensorStore's specification of a `model_weights` folder."""
    return {"driver": "ocdbt", "base": weights.resolve().as_uri() + "/"}


def delete(weights: Path, prefix: str) -> None:
    """Removes the keys that begin so from the database."""
    store = tensorstore.KvStore.open(database(weights)).result()
    keys = [key for key in store.list().result() if key.decode().startswith(prefix)]
    assert keys
    for key in keys:
        store.write(key, None).result()


def write_array(weights: Path, name: str, values: np.ndarray, dtype: str = "float32") -> None:
    """Adds an array, or puts it in another's place."""
    spec = {
        "driver": "zarr",
        "kvstore": {**database(weights), "path": f"{name}/"},
        "context": {"file_io_sync": False},
    }
    array = tensorstore.open(
        spec,
        create=True,
        delete_existing=True,
        shape=values.shape,
        dtype=getattr(tensorstore, dtype),
    ).result()
    array[...].write(values.astype(array.dtype.numpy_dtype)).result()


def write_official(step: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A step's folder of these arrays, by short name; returns it."""
    weights = step / "model_weights"
    weights.mkdir(parents=True)
    for name, values in arrays.items():
        write_array(weights, STORED_NAMES[name], values)
    return step
