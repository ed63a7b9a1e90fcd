"""What can be refused before any process starts; all of it only reads."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.index import MissingDataError
from ttt_megatron.data.stream import TokenStream
from ttt_megatron.data.validation import validation_sequences
from ttt_megatron.errors import PassingError, UserError
from ttt_megatron.parallel.accounts import device_error
from ttt_megatron.parallel.launcher import under_torchrun
from ttt_megatron.training.checkpoint_folder import (
    CHECKPOINTS,
    list_checkpoints,
    newest_complete,
    read_config,
    read_info,
    resolve_checkpoint,
)
from ttt_megatron.training.float8 import float8_backend
from ttt_megatron.training.fused import choose_adam
from ttt_megatron.training.fused_norm import choose_norm
from ttt_megatron.training.precision import compute_dtype, parameter_dtype_of
from ttt_megatron.training.resume import refuse_changes, refuse_other_data


def resolve_run(config: RunConfig) -> RunConfig:
    """The run with its vocabulary size taken from the data where the recipe leaves it open.

    Raises UserError for an engine, a fused AdamW or RMSNorm that is not installed, for CUDA graphs
    without CUDA, for data that cannot be read, has no row of the sequence length or no validation
    documents that are asked for, or needs a larger vocabulary than the model has, and for a
    vocabulary that does not divide among the tensor-parallel processes. It is a PassingError under
    torchrun where a GPU is missing, or data that other nodes have or that the run has read before.
    """
    if config.optimizer.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError(
            "optimizer.engine=deepspeed, but DeepSpeed is not installed: pip install "
            "'ttt-megatron[deepspeed]', or set optimizer.engine=megatron"
        )
    _refuse_what_needs_cuda(config)
    try:
        return with_vocabulary(config, check_data(config))
    except MissingDataError as error:
        if _was_there(config):
            raise PassingError(str(error)) from error
        raise


def _was_there(config: RunConfig) -> bool:
    """Whether what is missing here is a mount rather than the recipe's mistake: torchrun's other
    nodes may have the data, or this run has read them before."""
    if not under_torchrun():
        return False
    world = os.environ["WORLD_SIZE"]
    several = os.environ.get("LOCAL_WORLD_SIZE", world) != world
    return several or bool(list_checkpoints(Path(config.training.output) / CHECKPOINTS))


def check_data(config: RunConfig) -> int:
    """The vocabulary size of the run's data; raises UserError for data that it cannot train on."""
    if not config.data.path:
        raise UserError("data.path is empty: give the folder that `ttt-megatron prepare` wrote")
    data = config.data
    dataset = open_dataset(data.path)
    TokenStream(dataset, data.sequence_length, data.packing, data.seed)
    if config.training.eval_sequences:
        validation = open_dataset(data.path, "validation")
        validation_sequences(validation, data.sequence_length, config.training.eval_sequences)
    return dataset.vocab_size


def with_vocabulary(config: RunConfig, tokens: int | None) -> RunConfig:
    """The run with a vocabulary: its own, or that of data with so many tokens.

    Raises UserError if the data has more tokens than the model, if neither gives a number, or for
    one that does not divide among the tensor-parallel processes. None: the data is not there.
    """
    own, path, parts = config.model.vocab_size, config.data.path, config.parallel.tensor
    vocabulary = own or tokens
    if vocabulary is None:
        raise UserError(
            f"model.vocab_size is not set and there is no data at data.path={path} to take it "
            "from: set it, or prepare the data"
        )
    if vocabulary < (tokens or 0):
        raise UserError(
            f"model.vocab_size={vocabulary} is less than the {tokens} tokens of "
            f"{path}: leave it null to take the data's"
        )
    if vocabulary % parts:
        source = f"{path} gives" if own is None else "the recipe sets"
        raise UserError(
            f"parallel.tensor={parts} does not divide the model.vocab_size={vocabulary} that "
            f"{source}: set model.vocab_size={-(-vocabulary // parts) * parts}, whose last rows "
            f"no token uses"
        )
    return replace(config, model=replace(config.model, vocab_size=vocabulary))


def _refuse_what_needs_cuda(config: RunConfig) -> None:
    """Raises UserError for what is asked for by name and cannot be had here; where there is no GPU,
    a `device_error`."""
    on_cuda = config.training.device != "cpu" and torch.cuda.is_available()
    if config.training.cuda_graphs and not on_cuda:
        message = (
            "training.cuda_graphs = true, and torch finds no CUDA device here: leave cuda_graphs "
            "out, or run where there is one"
        )
        raise (UserError if config.training.device == "cpu" else device_error)(message)
    try:
        _refuse_engines(config, torch.device("cuda" if on_cuda else "cpu"))
    except UserError as error:
        if on_cuda or config.training.device == "cpu":
            raise
        raise device_error(str(error)) from error


def _refuse_engines(config: RunConfig, device: torch.device) -> None:
    if config.training.precision == "fp8":
        float8_backend(config)
    if config.training.fused_norm not in ("auto", "ttt_kernels"):
        choose_norm(config.training.fused_norm, device, compute_dtype(config))
    if config.optimizer.fused not in ("auto", "torch"):
        choose_adam(config.optimizer, device, parameter_dtype_of(config.training.precision))


def check_start(config: RunConfig, *, fresh: bool) -> None:
    """Raises UserError if the output folder cannot be written, holds a run that this one cannot
    go on with or of other data, or training.init_from names no checkpoint."""
    output = Path(config.training.output)
    checkpoint = None if fresh else find_resumable(output, quick=True)
    if checkpoint is not None:
        refuse_changes(read_config(checkpoint), config, str(checkpoint))
        refuse_other_data(read_info(checkpoint), config.data.path)
    elif config.training.init_from is not None:
        resolve_checkpoint(Path(config.training.init_from))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"training.output={output} cannot be made ({error}): choose another"
        ) from None
    if not os.access(output, os.W_OK):
        raise UserError(f"training.output={output} cannot be written to: choose another")


def find_resumable(output: Path, *, quick: bool = False) -> Path | None:
    """`newest_complete` of a run's folder, None if it has no checkpoint yet.

    Raises UserError if it has checkpoints and all are damaged.
    """
    folder = output / CHECKPOINTS
    return newest_complete(folder, quick=quick) if folder.is_dir() else None
