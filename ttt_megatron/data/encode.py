"""Documents to tokens, over processes; the order and the result do not depend on their number.

This module and what it imports stay free of torch, so that a worker process starts fast.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ttt_megatron.data.sources import NotUtf8Error, RawDocument, SourceFile, read_document
from ttt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from ttt_megatron.errors import UserError

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 256
# Batches in flight a worker: enough that none waits, few enough to bound memory.
_DEPTH = 4


@dataclass(frozen=True)
class EncodedDocument:
    """BOS and tokens of one document.

    Attributes:
        name: for reports and for the split.
        split: as in SourceFile.
        tokens: ids in the tokenizer's storage dtype, [n]; None if empty or skipped.
        text_bytes: UTF-8 bytes of the text.
        consumed: input bytes passed, for progress.
        skipped: whether it was passed over because it is not UTF-8.
    """

    name: str
    split: str | None
    tokens: np.ndarray | None
    text_bytes: int
    consumed: int
    skipped: bool = False


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    text_field: str = "text"
    skip_non_utf8: bool = False


def read_text(raw: RawDocument, reading: Reading) -> tuple[str, str | None]:
    """Name and text of a document; the text is None if it is not UTF-8 and may be skipped."""
    try:
        return read_document(raw, reading.text_field)
    except NotUtf8Error:
        if not reading.skip_non_utf8:
            raise
        return raw.source.name, None


def encode_document(raw: RawDocument, tokenizer: Tokenizer, reading: Reading) -> EncodedDocument:
    """Reads and tokenises one document."""
    name, text = read_text(raw, reading)
    split = raw.source.split
    if not text:
        return EncodedDocument(name, split, None, 0, raw.consumed, skipped=text is None)
    tokens = tokenizer.encode_document(text).astype(tokenizer.dtype)
    return EncodedDocument(name, split, tokens, len(text.encode("utf-8")), raw.consumed)


def encode_documents(
    documents: Iterable[RawDocument],
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    reading: Reading,
    workers: int,
) -> Iterator[EncodedDocument]:
    """Yields `documents` tokenised, in order.

    With more than one worker, processes load `tokenizer` from `tokenizer_folder`.

    Raises UserError for bad documents and for a worker that dies.
    """
    if workers == 1:
        for raw in documents:
            yield encode_document(raw, tokenizer, reading)
        return
    # Forking a process that holds threads (the progress display, tokenizers' pool) can deadlock.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start, (str(tokenizer_folder), reading))
    pending: deque[Future[list[EncodedDocument]]] = deque()
    try:
        for batch in batches(documents):
            pending.append(executor.submit(_encode_batch, batch))
            if len(pending) >= workers * _DEPTH:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenising process died, likely for lack of memory: lower --workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Groups documents so that a batch is worth sending to a process."""
    batch: list[RawDocument] = []
    size = 0
    for raw in documents:
        batch.append(raw)
        size += raw.source.size if raw.data is None else len(raw.data)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def automatic_workers(files: Sequence[SourceFile]) -> int:
    """A process for each usable CPU, or one where starting more costs more than it gives."""
    if sum(file.size for file in files) < 8 * _BATCH_BYTES:
        return 1
    return len(os.sched_getaffinity(0))


_worker: tuple[Tokenizer, Reading] | None = None


def _start(tokenizer_folder: str, reading: Reading) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent shuts the pool down
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (load_tokenizer(tokenizer_folder), reading)


def _encode_batch(batch: list[RawDocument]) -> list[EncodedDocument]:
    assert _worker is not None
    return [encode_document(raw, *_worker) for raw in batch]
