"""The model's arrays in a Megatron checkpoint: torch_dist folders, and files of one rank.

Either way by the names that GPTModel's parameters have; those of torch_dist are stacked over
layers, or not, as they were saved.
"""

import contextlib
import io
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ttt_megatron.errors import UserError
from ttt_megatron.exchange.inert_pickle import load_inert

_TRACKER = "latest_checkpointed_iteration.txt"
_METADATA, _COMMON = ".metadata", "common.pt"
_RANK_FILE = "model_optim_rng.pt"
_RANKS = ("mp_rank_00", "mp_rank_00_000")
# What optimizers and random states are stored under; everything else is taken for the model's.
_NOT_MODEL = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")


class MegatronArrays(ABC):
    """Arrays by name, with what the checkpoint says of its run.

    Attributes:
        path: the folder or file, as messages name it.
        arguments: the run's arguments by name; empty if the checkpoint has none.
        iteration: steps done, 0 if it does not say.
        shapes: every array's shape.
    """

    path: Path
    arguments: dict[str, Any]
    iteration: int
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """A whole array as float32; UserError if it cannot be read, or is not finite."""
        tensor = self._read(name)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self.path}: array {name} is stored as {tensor.dtype}, and floating point is "
                f"imported; it is no model's weight"
            )
        tensor = tensor.to(torch.float32)
        if not tensor.isfinite().all():
            raise UserError(
                f"{self.path}: array {name} has entries that are not finite; use another step"
            )
        return tensor

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """A whole array as it is stored."""

    def _take(self, common: Any) -> None:
        """Remember the arguments and the iteration that are stored beside the arrays."""
        common = common if isinstance(common, dict) else {}
        arguments = common.get("args")
        self.arguments = dict(vars(arguments)) if hasattr(arguments, "__dict__") else {}
        iteration = common.get("iteration", self.arguments.get("iteration", 0))
        self.iteration = iteration if isinstance(iteration, int) else 0


def open_megatron(path: Path) -> MegatronArrays:
    """The arrays of an iteration's folder, or of the last one in a run's folder.

    Raises UserError if it is neither, or was cut for several processes in the old format.
    """
    tracker = path / _TRACKER
    if tracker.is_file():
        last = tracker.read_text(encoding="utf-8").strip()
        path = path / (f"iter_{int(last):07d}" if last.isdigit() else last)
    if (path / _METADATA).is_file():
        return _Distributed(path)
    ranks = sorted(p.name for p in path.glob("mp_rank_*")) if path.is_dir() else []
    if not ranks:
        raise UserError(
            f"{path} is no Megatron checkpoint: give a folder that holds {_METADATA} (torch_dist) "
            f"or {_RANKS[0]}/{_RANK_FILE}"
        )
    if len(ranks) > 1 or ranks[0] not in _RANKS:
        raise UserError(
            f"{path} is cut for {len(ranks)} processes in the old format ({ranks[-1]}): save it "
            f"as torch_dist first (Megatron's --ckpt-convert-format torch_dist)"
        )
    return _OneRank(path / ranks[0] / _RANK_FILE)


class _Distributed(MegatronArrays):
    """A torch_dist folder, whatever the layout that wrote it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._reader = dcp.FileSystemReader(folder)
        try:
            entries = self._reader.read_metadata().state_dict_metadata
            common = load_inert(folder / _COMMON) if (folder / _COMMON).is_file() else {}
        except Exception as error:  # whatever a damaged pickle raises
            raise _damaged(folder, error) from None
        tensors = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_NOT_MODEL)
        }
        self._dtypes = {key: entry.properties.dtype for key, entry in tensors.items()}
        self.shapes = {key: tuple(entry.size) for key, entry in tensors.items()}
        self._take(common)

    def _read(self, name: str) -> Tensor:
        read = {name: torch.empty(self.shapes[name], dtype=self._dtypes[name])}
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                dcp.load(read, storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # torch's own is no Exception
            raise _damaged(self.path, error, name) from None
        return read[name]


class _OneRank(MegatronArrays):
    """The file of the only rank of a model that was not cut."""

    def __init__(self, file: Path) -> None:
        self.path = file
        try:
            state = load_inert(file)
            model = state["model"]
            self._tensors = {n: t for n, t in model.items() if isinstance(t, Tensor)}
        except Exception as error:  # whatever a damaged pickle raises
            raise _damaged(file, error) from None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._take(state)

    def _read(self, name: str) -> Tensor:
        return self._tensors[name]


def _damaged(path: Path, error: BaseException, name: str | None = None) -> UserError:
    cause = error
    if isinstance(error, CheckpointException):
        cause, _ = next(iter(error.failures.values()))
    while (link := cause.__cause__ or cause.__context__) is not None:
        cause = link
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    what = "cannot be read" if name is None else f"array {name} cannot be read"
    return UserError(f"{path}: {what} ({reason}); copy the checkpoint again, whole")
