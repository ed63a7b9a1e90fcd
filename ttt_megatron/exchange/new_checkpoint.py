"""A run folder that holds one checkpoint, of weights that come from elsewhere."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from ttt_megatron.config import to_yaml
from ttt_megatron.config.schema import ModelConfig, RunConfig
from ttt_megatron.data.output_folder import replacing
from ttt_megatron.data.tokenizer import Tokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_source import Weights
from ttt_megatron.model.transformer import LanguageModel
from ttt_megatron.training.checkpoint_folder import (
    CHECKPOINTS,
    MODEL_KEY,
    RECIPE,
    STATE,
    TOKENIZER,
    CheckpointInfo,
    checkpoint_name,
    write_info,
)
from ttt_megatron.training.manifest import write_manifest

# A checkpoint names a learner's parameters, whose model is an attribute of it.
_PREFIX = f"{MODEL_KEY}.model."
_READ_BACK = 1 << 28


def empty_weights(model: ModelConfig) -> Weights:
    """Memory for the parameters of a model, every entry nan: float32, on the CPU."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LanguageModel(model).named_parameters()}
    return {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}


def refuse_output(output: Path) -> None:
    """Raises UserError if a new run's folder cannot be `output`: it is there and not empty."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty: choose another folder")


def write_checkpoint(
    output: Path, config: RunConfig, weights: Weights, tokenizer: Tokenizer | None, step: int
) -> Path:
    """Writes `output/checkpoints/step-…`, reads it back, and returns it; all of it or nothing.

    Raises UserError if it cannot be written, or is not to the bit what was to be written.
    """
    refuse_output(output)
    name = Path(CHECKPOINTS) / checkpoint_name(step)
    with replacing(output) as beside:
        try:
            _fill(beside / name, config, weights, tokenizer, step)
        except OSError as error:
            raise UserError(
                f"--output {output} cannot be written ({error}): see that there is room"
            ) from None
        for parameter in _differing(beside / name / STATE, weights):
            raise UserError(
                f"--output {output}: {parameter} is not read back as it was written; the disk or "
                f"its driver is at fault, choose another folder"
            )
    return output / name


def _fill(
    folder: Path, config: RunConfig, weights: Weights, tokenizer: Tokenizer | None, step: int
) -> None:
    (folder / STATE).mkdir(parents=True)
    with _quietly():
        dcp.save(
            {f"{_PREFIX}{name}": tensor for name, tensor in weights.items()},
            storage_writer=dcp.FileSystemWriter(folder / STATE),
            no_dist=True,
        )
    (folder / RECIPE).write_text(to_yaml(config), encoding="utf-8")
    (folder / TOKENIZER).mkdir()
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    info = CheckpointInfo(
        path=str(folder), step=step, loss=float("nan"), finite=True, data_fingerprint=""
    )
    write_info(folder, info)
    write_manifest(folder)


def _differing(state: Path, weights: Weights) -> Iterator[str]:
    """Names of parameters that are read otherwise than they are in memory."""
    for names in _batches(weights):
        read = {f"{_PREFIX}{name}": torch.empty_like(weights[name]) for name in names}
        with _quietly():
            dcp.load(read, storage_reader=dcp.FileSystemReader(state), no_dist=True)
        for name in names:
            found, written = read[f"{_PREFIX}{name}"], weights[name]
            if not torch.equal(found.view(torch.int32), written.view(torch.int32)):
                yield name


def _batches(weights: Weights) -> Iterator[list[str]]:
    """Names in turn, of so many entries at once: a second copy of a large model has no room."""
    batch: list[str] = []
    size = 0
    for name, tensor in weights.items():
        if batch and size + tensor.numel() > _READ_BACK:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += tensor.numel()
    yield batch


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch tells at length that no process group is there."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
