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
    """What a checkpoint folder holds, the learner on the chosen device."""

    learner: "Learner"
    config: "RunConfig"
    info: "CheckpointInfo"
    tokenizer: "Tokenizer"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.info.path)

    @property
    def run_folder(self) -> Path:
        """The folder of its run, or, for a checkpoint moved elsewhere, the one it lies in."""
        from ttt_megatron.training.checkpoint_folder import CHECKPOINTS

        parent = self.checkpoint.parent
        return parent.parent if parent.name == CHECKPOINTS else parent

    @property
    def kernels(self) -> str:
        """Whose kernels the learner computes with, and why."""
        import ttt_kernels

        weight = self.learner.model.head_weight
        return str(ttt_kernels.backend(weight.device, weight.dtype))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CHECKPOINT_OR_RUN and --device."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_RUN",
        help="a checkpoint's folder, or a run's folder (its newest complete checkpoint)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to compute; auto is the GPU if there is one (default: %(default)s)",
    )


def load_model(path: str, device: str) -> LoadedModel:
    """Loads a checkpoint; UserError if there is none, or no such device."""
    if not Path(path).is_dir():
        raise UserError(f"{path} is no folder: give a run's folder or one of its checkpoints")
    import torch

    from ttt_megatron.data.tokenizer import load_tokenizer
    from ttt_megatron.training.checkpoint_folder import TOKENIZER
    from ttt_megatron.training.weights import load_learner

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    learner, config, info = load_learner(path)
    tokenizer = load_tokenizer(Path(info.path) / TOKENIZER)
    rows = learner.model.config.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{info.path}: its tokenizer has {tokenizer.vocab_size} ids and the model {rows} rows; "
            "train with model.vocab_size of at least the tokenizer's"
        )
    return LoadedModel(
        learner=learner.to(chosen).eval(), config=config, info=info, tokenizer=tokenizer
    )
