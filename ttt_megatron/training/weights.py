"""A checkpoint's weights alone, read in one process without any process group."""

import contextlib
import io
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.training.checkpoint_folder import (
    MODEL_KEY,
    STATE,
    CheckpointInfo,
    read_config,
    read_info,
    resolve_checkpoint,
)
from ttt_megatron.training.precision import compute_dtype, parameter_dtype_of

_PREFIX = f"{MODEL_KEY}."


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint folder by name, whole, on the CPU."""
    reader = dcp.FileSystemReader(checkpoint / STATE)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def build_learner(config: RunConfig) -> Learner:
    """A freshly initialised learner on the CPU, with the run's precision."""
    return Learner(
        config.model,
        config.inner,
        dtype=parameter_dtype_of(config.training.precision),
        compute_dtype=compute_dtype(config.training.precision),
        recompute_prefix=config.training.recompute_prefix,
        seed=config.training.seed,
    )


def load_learner(path: Path | str) -> tuple[Learner, RunConfig, CheckpointInfo]:
    """The model of a checkpoint folder, or of a run folder's newest complete checkpoint.

    On the CPU, needing no process group. Raises UserError if there is no complete checkpoint.
    """
    checkpoint = resolve_checkpoint(Path(path))
    config = read_config(checkpoint)
    learner = build_learner(config)
    learner.load_state_dict(read_weights(checkpoint), strict=False)
    return learner, config, read_info(checkpoint)
