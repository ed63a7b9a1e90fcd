"""A trained model and its tokenizer, as `evaluate` and `generate` start from."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.config.schema import RunConfig
    from ttt_megatron.data.tokenizer import Tokenizer
    from ttt_megatron.meta.learner import Learner
    from ttt_megatron.training.checkpoint_folder import CheckpointInfo


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What a checkpoint or an exported folder holds, the learner on the chosen device."""

    learner: "Learner"
    config: "RunConfig"
    info: "CheckpointInfo"
    tokenizer: "Tokenizer"

    tokenizer_folder: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's or exported folder."""
        return Path(self.info.path)

    @property
    def run_folder(self) -> Path:
        """The folder of its run, or, for a checkpoint moved elsewhere, the one it lies in.

        An exported folder is its own.
        """
        from ttt_megatron.training.checkpoint_folder import CHECKPOINTS

        if self.tokenizer_folder == self.checkpoint:
            return self.checkpoint
        parent = self.checkpoint.parent
        return parent.parent if parent.name == CHECKPOINTS else parent

    @property
    def kernels(self) -> str:
        """Whose kernels the learner computes with, and why."""
        import ttt_kernels

        weight = self.learner.model.head_weight
        return str(ttt_kernels.backend(weight.device, weight.dtype))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and --device."""
    parser.add_argument(
        "checkpoint",
        metavar="MODEL",
        help="a checkpoint's folder, a run's (its newest complete checkpoint), or an exported one",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to compute; auto is the GPU if there is one (default: %(default)s)",
    )


def load_model(path: str, device: str) -> LoadedModel:
    """Loads a checkpoint or an exported folder; UserError if there is none, or no such device."""
    if not Path(path).is_dir():
        raise UserError(f"{path} is no folder: give a run's, one of its checkpoints, or an export")
    import torch

    from ttt_megatron.data.tokenizer import load_tokenizer
    from ttt_megatron.exchange.exported import is_exported, load_exported
    from ttt_megatron.training.checkpoint_folder import TOKENIZER
    from ttt_megatron.training.weights import load_learner

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if is_exported(Path(path)):
        learner, config, info = load_exported(Path(path))
        tokenizer_folder = Path(info.path)
    else:
        learner, config, info = load_learner(path)
        tokenizer_folder = Path(info.path) / TOKENIZER
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = learner.model.config.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{info.path}: its tokenizer has {tokenizer.vocab_size} ids and the model {rows} rows; "
            "train with model.vocab_size of at least the tokenizer's"
        )
    return LoadedModel(
        learner=learner.to(chosen).eval(),
        config=config,
        info=info,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
    )
