"""Text to a prepared folder: list, tokenise, split, shard, index; whole or not at all."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ttt_megatron.data.encode import (
    Reading,
    automatic_workers,
    encode_documents,
    read_text,
)
from ttt_megatron.data.index import SPLITS, Index, write_index
from ttt_megatron.data.output_folder import check_output, replacing
from ttt_megatron.data.shard_writer import SplitWriter
from ttt_megatron.data.sources import SourceFile, find_files, raw_documents
from ttt_megatron.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    check_bpe_size,
    import_tokenizer,
    train_bpe,
)
from ttt_megatron.errors import UserError

DEFAULT_SHARD_TOKENS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare.

    Attributes:
        inputs: files and folders of text and JSONL.
        output: folder to write.
        tokenizer: "bytes", "bpe:SIZE", or the path of a Hugging Face tokenizer.
        bos: token that opens documents, for a Hugging Face tokenizer that does not tell.
        validation: share of the documents held out, 0 to below 1; unused with validation_inputs.
        validation_inputs: files and folders that are the validation split.
        include: glob patterns of the files of folders that are taken; none takes all.
        exclude: glob patterns of those that are left out.
        text_field: field of a JSONL line that holds the text.
        non_utf8: what to do with documents that are not UTF-8.
        workers: processes that tokenise; None chooses.
        shard_tokens: tokens a shard, about.
        seed: of the split.
        overwrite: replace an existing prepared folder.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str = "bytes"
    bos: str | None = None
    validation: float = 0.1
    validation_inputs: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    non_utf8: Literal["error", "skip"] = "error"
    workers: int | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class PrepareProgress:
    """How far one phase has come; `consumed` of `total` are bytes of the input files."""

    phase: str
    documents: int
    text_bytes: int
    consumed: int
    total: int


@dataclass(frozen=True)
class PrepareReport:
    """What was written, and how many documents were passed over."""

    output: Path
    index: Index
    empty_documents: int
    non_utf8_documents: int


ProgressCallback = Callable[[PrepareProgress], None]


def prepare(
    options: PrepareOptions, on_progress: ProgressCallback = lambda progress: None
) -> PrepareReport:
    """Writes the prepared folder; on any error nothing is left of it.

    Raises UserError for bad options, bad documents, an existing output and an empty split.
    """
    output = Path(options.output).absolute()
    _check_options(options)
    check_output(output, options.overwrite)
    files = _find_files(options, output)
    with replacing(output) as folder:
        tokenizer = _make_tokenizer(options, files, on_progress)
        report = _write(options, files, tokenizer, folder, on_progress)
    return report


def split_of(name: str, seed: int, validation: float) -> str:
    """The split a document falls in: a hash of its name and the seed, against the share."""
    digest = hashlib.sha256(f"{seed}:{name}".encode(errors="surrogatepass")).digest()
    drawn = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if drawn < validation else "train"


def _check_options(options: PrepareOptions) -> None:
    if not 0 <= options.validation < 1:
        raise UserError(f"--validation {options.validation} must be at least 0 and below 1")
    if options.shard_tokens < 1:
        raise UserError(f"--shard-tokens {options.shard_tokens} must be at least 1")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")
    size = _bpe_size(options.tokenizer)
    if size is not None:
        check_bpe_size(size)
    if options.bos is not None and (size is not None or options.tokenizer == "bytes"):
        raise UserError(
            f"--bos {options.bos}: --tokenizer {options.tokenizer} brings its own; leave --bos out"
        )


def _bpe_size(tokenizer: str) -> int | None:
    if not tokenizer.startswith("bpe:"):
        return None
    try:
        return int(tokenizer.removeprefix("bpe:"))
    except ValueError:
        raise UserError(
            f"--tokenizer {tokenizer}: the size after bpe: must be a whole number, as in bpe:4096"
        ) from None


def _find_files(options: PrepareOptions, output: Path) -> list[SourceFile]:
    fixed = "train" if options.validation_inputs or options.validation == 0 else None

    def find(inputs: tuple[str, ...], split: str | None) -> list[SourceFile]:
        return find_files(
            inputs, include=options.include, exclude=options.exclude, split=split, skip=output
        )

    # A file reached twice (overlapping inputs, links) counts once.
    train = {file.path.resolve(): file for file in reversed(find(options.inputs, fixed))}
    held_out = {
        file.path.resolve(): file
        for file in reversed(find(options.validation_inputs, "validation"))
    }
    shared = train.keys() & held_out.keys()
    if shared:
        raise UserError(
            f"{min(shared)} is both an input and a --validation-input: leave it out of one of them"
        )
    return [*reversed(train.values()), *reversed(held_out.values())]


def _make_tokenizer(
    options: PrepareOptions, files: list[SourceFile], on_progress: ProgressCallback
) -> Tokenizer:
    size = _bpe_size(options.tokenizer)
    if size is not None:
        return train_bpe(_training_texts(options, files, on_progress), size)
    if options.tokenizer == "bytes":
        return ByteTokenizer()
    return import_tokenizer(options.tokenizer, options.bos)


def _training_texts(
    options: PrepareOptions, files: list[SourceFile], on_progress: ProgressCallback
) -> Iterator[str]:
    reading = Reading(options.text_field, options.non_utf8 == "skip")
    chosen = [file for file in files if file.split != "validation"]
    total = sum(file.size for file in chosen)
    documents = text_bytes = consumed = 0
    for raw in raw_documents(chosen):
        name, text = read_text(raw, reading)
        consumed += raw.consumed
        split = raw.source.split or split_of(name, options.seed, options.validation)
        if text and split == "train":
            documents += 1
            text_bytes += len(text.encode("utf-8"))
            yield text
        on_progress(PrepareProgress("train tokenizer", documents, text_bytes, consumed, total))


def _write(
    options: PrepareOptions,
    files: list[SourceFile],
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: ProgressCallback,
) -> PrepareReport:
    tokenizer.save(folder)  # for the worker processes
    reading = Reading(options.text_field, options.non_utf8 == "skip")
    workers = options.workers or automatic_workers(files)
    total = sum(file.size for file in files)
    text_bytes = consumed = empty = skipped = 0
    writers = {split: SplitWriter(folder, split, options.shard_tokens) for split in SPLITS}
    try:
        encoded = encode_documents(raw_documents(files), tokenizer, folder, reading, workers)
        for count, document in enumerate(encoded, start=1):
            consumed += document.consumed
            text_bytes += document.text_bytes
            if document.tokens is not None:
                name = document.name
                split = document.split or split_of(name, options.seed, options.validation)
                writers[split].write(name, document.tokens, document.text_bytes)
            skipped += document.skipped
            empty += document.tokens is None and not document.skipped
            on_progress(PrepareProgress("tokenize", count, text_bytes, consumed, total))
        _check_splits(options, {split: writer.documents for split, writer in writers.items()})
        entries = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    tokenizer.bytes_per_token = entries["train"].text_bytes / entries["train"].tokens
    tokenizer.save(folder)
    if not entries["validation"].documents:
        for table in (entries["validation"].document_table, entries["validation"].name_table):
            (folder / table.file).unlink()
        del entries["validation"]
    index = write_index(
        folder,
        dtype=tokenizer.dtype.name,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        splits=entries,
    )
    return PrepareReport(Path(options.output), index, empty, skipped)


def _check_splits(options: PrepareOptions, documents: dict[str, int]) -> None:
    inputs = ", ".join(options.inputs)
    if not any(documents.values()):
        raise UserError(f"every document in {inputs} is empty: give text to prepare")
    if not documents["train"]:
        raise UserError(
            f"no document of {inputs} fell in the training split: lower --validation "
            f"{options.validation}, or give the held-out text with --validation-input"
        )
    if options.validation_inputs and not documents["validation"]:
        held_out = ", ".join(options.validation_inputs)
        raise UserError(f"every document in {held_out} is empty: give text to validate on")
    if options.validation > 0 and not documents["validation"]:
        raise UserError(
            f"none of the {documents['train']} documents of {inputs} fell in the validation "
            f"split: raise --validation {options.validation}, change --seed, give held-out text "
            "with --validation-input, or pass --validation 0 for none"
        )
