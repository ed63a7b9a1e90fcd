"""Importing a checkpoint of another implementation: look, settle the settings, read, write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ttt_megatron.config.recipe import named_keys
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.tokenizer import ByteTokenizer, Tokenizer, import_tokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_settings import resolve_settings
from ttt_megatron.exchange.import_source import ImportSource, Weights
from ttt_megatron.exchange.new_checkpoint import empty_weights, refuse_output, write_checkpoint
from ttt_megatron.model.init import draw

Kind = Literal["jax", "hf", "megatron"]
RopeLayout = Literal["half", "interleaved"]
OnArray = Callable[[str, int, int], None]
"""Called before an array is read: its name, how many were, and how many there are."""

NO_TOKENIZER = "none"
_PRIME, _PRIME_POST_NORM = ".prime_", ".prime_post_norm."


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What is asked for; `overrides` are key=value, `bos` names the token that opens documents.

    `rope_layout` says how a Megatron checkpoint that does not say so itself lays out heads.
    """

    kind: Kind
    source: Path
    output: Path
    recipe: Path | None = None
    overrides: Sequence[str] = ()
    tokenizer: str | None = None
    bos: str | None = None
    rope_layout: RopeLayout | None = None


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written: the checkpoint, its configuration, and what a user should know of it."""

    checkpoint: Path
    config: RunConfig
    kind: str
    parameters: int
    notes: Sequence[str]


def import_checkpoint(options: ImportOptions, on_array: OnArray | None = None) -> Imported:
    """Writes a run folder that holds the source's weights as one checkpoint of ours.

    Takes memory for the parameters in float32 and for the largest array. Raises UserError naming
    the file, array or key that is at fault; then nothing is written.
    """
    refuse_output(options.output)
    source = look_at(options)
    config, changes = resolve_settings(source, options.recipe, options.overrides, options.output)
    tokenizer = _tokenizer(options, source)
    rows = config.model.vocab_size or 0
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise UserError(
            f"--tokenizer {options.tokenizer or source.tokenizer} has {tokenizer.vocab_size} ids, "
            f"and {source.path} an embedding of {rows} rows; give the tokenizer that the model "
            f"was trained with"
        )
    weights = read_weights(source, config, on_array)
    checkpoint = write_checkpoint(options.output, config, weights, tokenizer, source.step)
    return Imported(
        checkpoint=checkpoint,
        config=config,
        kind=source.kind,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        notes=(*source.notes, *changes),
    )


def look_at(options: ImportOptions) -> ImportSource:
    """The source as its kind of checkpoint; raises UserError if it is none."""
    if not options.source.exists():
        remote = "://" in str(options.source) or ":/" in str(options.source)
        what = "copy it to a local folder first" if remote else "give the checkpoint's folder"
        raise UserError(f"{options.source}: there is no such folder; {what}")
    if options.kind == "jax":
        from ttt_megatron.exchange.import_jax import look_at_official

        return look_at_official(options.source)
    if options.kind == "hf":
        from ttt_megatron.exchange.import_hf import look_at_hugging_face

        return look_at_hugging_face(options.source)
    from ttt_megatron.exchange.import_megatron import look_at_megatron

    given = named_keys(options.recipe, options.overrides)
    return look_at_megatron(options.source, options.rope_layout, given.get("model.num_heads"))


@torch.no_grad()
def read_weights(source: ImportSource, config: RunConfig, on_array: OnArray | None) -> Weights:
    """The source's weights as ours; prime MLPs that it lacks start as an extended model's do."""
    weights = empty_weights(config.model)
    for done, name in enumerate(source.arrays):
        if on_array is not None:
            on_array(name, done, len(source.arrays))
        source.place(name, weights, config.model)
    if on_array is not None:
        on_array("", len(source.arrays), len(source.arrays))
    if "model.num_suffix_layers" not in source.shapes:
        for name, tensor in weights.items():
            if _PRIME_POST_NORM in name:
                # The prime branch then adds nothing: the function stays the source's.
                tensor.zero_()
            elif _PRIME in name:
                tensor.copy_(draw(name, tensor.shape, config.model, config.training.seed))
    unfilled = [name for name, tensor in weights.items() if tensor.isnan().any()]
    if unfilled:
        raise AssertionError(f"no array of {source.path} went into {unfilled[0]}")
    return weights


def _tokenizer(options: ImportOptions, source: ImportSource) -> Tokenizer | None:
    chosen = options.tokenizer
    if chosen is None and source.tokenizer is None:
        raise UserError(
            f"{source.path} holds no tokenizer: give --tokenizer FOLDER (of the tokenizer it was "
            f"trained with), --tokenizer bytes, or --tokenizer {NO_TOKENIZER} for weights to train "
            f"on from but neither to evaluate nor to generate with"
        )
    if chosen == NO_TOKENIZER:
        return None
    if chosen == "bytes":
        return ByteTokenizer()
    return import_tokenizer(Path(chosen) if chosen else source.tokenizer or "", options.bos)
