"""The models that `evaluate` reads with, in which ways, and the held-out documents they read."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_megatron.cli.loaded_model import LoadedModel, load_model
from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.data.dataset import TokenDataset
    from ttt_megatron.data.tokenizer import Tokenizer
    from ttt_megatron.data.validation import ValidationSequences


@dataclass(frozen=True, kw_only=True)
class Way:
    """One curve: a model, and whether inner steps are taken."""

    loaded: LoadedModel
    inner_steps: bool

    def batch(self, asked: int | None) -> int:
        """Documents read at once: what was asked for, or the run's micro batch."""
        return asked or self.loaded.config.training.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What all evaluations of one call share.

    ways: by name, `on` and `off` being MODEL with inner steps and without; length: positions of
    each document, as `--length` or the run has it, or None for whole documents; asked: by task, the
    options that its numbers depend on, as they were given.
    """

    model: LoadedModel
    ways: dict[str, Way]
    dataset: "TokenDataset"
    length: int | None
    documents: int | None
    batch: int | None
    output: Path
    asked: Mapping[str, Mapping[str, Any]]

    def sequences(self) -> "ValidationSequences":
        """The documents, cut; UserError if none is long enough."""
        from ttt_megatron.data.validation import validation_sequences

        return validation_sequences(self.dataset, self.length, self.documents)

    def long_sequences(self, task: str) -> "ValidationSequences":
        """The same for tasks that need one length; an error names the longest document."""
        longest = int(self.dataset.lengths.argmax())
        held = int(self.dataset.lengths[longest])
        if self.length is None:
            raise UserError(
                f"--length 0 with --task {task}, which reads documents of one length: give a "
                f"number of tokens below {held:,}"
            )
        if held <= self.length:
            raise UserError(
                f"--length {self.length}: --task {task} needs documents of {self.length + 1:,} "
                f"tokens, and the longest in the {self.dataset.split} split of "
                f"{self.dataset.path}, {self.dataset.names[longest]}, has {held:,}; give less"
            )
        return self.sequences()

    def about(self, task: str) -> dict[str, Any]:
        """What was evaluated, for reports, and with which of the task's options."""
        others = {
            name: str(way.loaded.checkpoint)
            for name, way in self.ways.items()
            if way.loaded is not self.model
        }
        return {
            "checkpoint": str(self.model.checkpoint),
            "name": self.model.config.name,
            "step": self.model.info.step,
            "control": others.get("control"),
            "reference": others.get("reference"),
            "data": str(self.dataset.path),
            "data_fingerprint": self.dataset.fingerprint,
            "kernels": self.model.kernels,
            "window_size": self.model.config.model.window_size,
            "chunk_size": self.model.config.inner.chunk_size,
            "length": self.length,
            "asked": dict(self.asked[task]),
        }


def load_evaluated(args: argparse.Namespace, asked: Mapping[str, Mapping[str, Any]]) -> Evaluated:
    """Loads models and data; raises UserError for what does not fit together."""
    from ttt_megatron.data.dataset import open_dataset
    from ttt_megatron.data.tokenizer import load_tokenizer

    model = load_model(args.checkpoint, args.device)
    others = {
        name: load_model(path, args.device)
        for name in ("control", "reference")
        if (path := getattr(args, name)) is not None
    }
    dataset = open_dataset(args.data or model.config.data.path, "validation")
    tokenizer = load_tokenizer(dataset.path)
    for loaded in (model, *others.values()):
        if not same_tokenizer(tokenizer, loaded.tokenizer):
            kind = loaded.tokenizer.kind
            wanted = "bytes" if kind == "bytes" else loaded.tokenizer_folder
            raise UserError(
                f"{dataset.path} was prepared with another tokenizer than {loaded.checkpoint} was "
                f"trained with: prepare it with --tokenizer {wanted}"
            )
    length = model.config.data.sequence_length if args.length is None else args.length
    return Evaluated(
        model=model,
        ways=_ways(model, others),
        dataset=dataset,
        length=length or None,
        documents=args.documents or None,
        batch=args.batch,
        output=Path(args.output or model.run_folder / "evaluation"),
        asked=asked,
    )


def takes_inner_steps(loaded: LoadedModel) -> bool:
    """Whether a model is meant to be read with inner steps."""
    return loaded.config.inner.mode != "off" and loaded.config.model.num_suffix_layers > 0


def same_tokenizer(one: "Tokenizer", other: "Tokenizer") -> bool:
    """Whether two tokenizers give the same ids for every text."""
    return (one.kind, one.vocab_size, one.bos_id, one.serialized()) == (
        other.kind,
        other.vocab_size,
        other.bos_id,
        other.serialized(),
    )


def _ways(model: LoadedModel, others: dict[str, LoadedModel]) -> dict[str, Way]:
    ways = {"on": Way(loaded=model, inner_steps=True)} if takes_inner_steps(model) else {}
    ways["off"] = Way(loaded=model, inner_steps=False)
    for name, loaded in others.items():
        ways[name] = Way(loaded=loaded, inner_steps=takes_inner_steps(loaded))
    return ways
