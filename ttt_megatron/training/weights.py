"""A checkpoint's weights alone, read in one process without any process group."""

import contextlib
import io
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ttt_megatron.config.schema import ATTENTION_MIXERS, RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.slots import Slots
from ttt_megatron.model.stage import Stage
from ttt_megatron.training.checkpoint_folder import (
    MODEL_KEY,
    STATE,
    CheckpointInfo,
    read_config,
    read_info,
    resolve_checkpoint,
)
from ttt_megatron.training.float8 import float8_products
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


def stored_shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Every parameter's whole shape by name, of a checkpoint folder; no values are read."""
    entries = dcp.FileSystemReader(checkpoint / STATE).read_metadata().state_dict_metadata
    return {
        key.removeprefix(_PREFIX): entry.size
        for key, entry in entries.items()
        if key.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }


def refuse_other_parameters(names: set[str], checkpoint: Path) -> None:
    """Raises UserError unless a checkpoint folder's parameters have these names, and only these."""
    metadata = dcp.FileSystemReader(checkpoint / STATE).read_metadata().state_dict_metadata
    stored = {key.removeprefix(_PREFIX) for key in metadata if key.startswith(_PREFIX)}
    for verb, differing in (("lacks", names - stored), ("has an unknown", stored - names)):
        if differing:
            raise UserError(
                f"checkpoint {checkpoint} {verb} parameter {min(differing)} ({len(differing)} in "
                f"all): it was written by a version with another model, use that one"
            )


def build_learner(
    config: RunConfig, slots: Slots | None = None, stage: Stage | None = None
) -> Learner:
    """A freshly initialised learner on the CPU, with the run's precision.

    `slots` are the layers of a rank's part of it, `stage` its blocks; None builds all of it.
    """
    if set(config.model.mixer_kinds) - set(ATTENTION_MIXERS):
        from ttt_megatron.baselines import with_mixers

        slots = with_mixers(slots or Slots(), config.model)
    return Learner(
        config.model,
        config.inner,
        dtype=parameter_dtype_of(config.training.precision),
        compute_dtype=compute_dtype(config),
        recompute_prefix=config.training.recompute_prefix,
        seed=config.training.seed,
        slots=slots,
        stage=stage,
        float8=float8_products(config),
    )


def load_learner(path: Path | str) -> tuple[Learner, RunConfig, CheckpointInfo]:
    """The model of a checkpoint folder, or of a run folder's newest complete checkpoint.

    On the CPU, whole, needing no process group, whatever layout trained it. Raises UserError if
    there is no complete checkpoint, or its parameters are not those of its configuration's model.
    """
    checkpoint = resolve_checkpoint(Path(path))
    config = read_config(checkpoint)
    learner = build_learner(config)
    refuse_other_parameters({name for name, _ in learner.named_parameters()}, checkpoint)
    learner.load_state_dict(read_weights(checkpoint))
    return learner, config, read_info(checkpoint)
