"""Writing one split: WebDataset tar shards of token arrays, and the two side files.

A document is one sample `<number>.tokens.npy`, so WebDataset readers decode the shards as they
are; the byte offset of its tokens goes to the side file, so they are also read at random.
"""

import hashlib
import io
import json
import os
from array import array
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from ttt_megatron.data.index import DOCUMENT_DTYPE, ShardEntry, SplitEntry, file_entry

_TAR_HEADER = 512


class SplitWriter:
    """Appends documents to `<split>-NNNNN.tar` in `folder`.

    The bytes written depend on the documents and `shard_tokens` only.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        """A shard is closed before the document that would take it beyond `shard_tokens`."""
        self._folder = folder
        self._split = split
        self._shard_tokens = shard_tokens
        self._shards: list[ShardEntry] = []
        self._shard: _Shard | None = None
        self._columns = {name: array("q") for name in DOCUMENT_DTYPE.names or ()}
        self._names_path = folder / f"{split}.names.jsonl"
        self._names = open(self._names_path, "w", encoding="utf-8")  # noqa: SIM115

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._columns["length"])

    def write(self, name: str, tokens: np.ndarray, text_bytes: int) -> None:
        """Appends one document; `tokens` [n] in its storage dtype."""
        shard = self._shard
        if shard is not None and shard.tokens + len(tokens) > self._shard_tokens:
            self._shards.append(shard.close())
            shard = None
        if shard is None:
            number = len(self._shards)
            shard = self._shard = _Shard(self._folder / f"{self._split}-{number:05d}.tar")
        offset = shard.write(f"{self.documents:09d}", tokens)
        row = (len(self._shards), offset, len(tokens), text_bytes)
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        self._names.write(json.dumps(name) + "\n")

    def close(self) -> SplitEntry:
        """Closes the shards, writes the side files and describes it all."""
        if self._shard is not None:
            self._shards.append(self._shard.close())
        self.abort()
        table = np.empty(self.documents, DOCUMENT_DTYPE)
        for name, column in self._columns.items():
            table[name] = column
        table_path = self._folder / f"{self._split}.documents.npy"
        np.save(table_path, table)
        return SplitEntry(
            documents=len(table),
            tokens=int(table["length"].sum()),
            text_bytes=int(table["text_bytes"].sum()),
            longest_document=int(table["length"].max(initial=0)),
            shards=tuple(self._shards),
            document_table=file_entry(table_path),
            name_table=file_entry(self._names_path),
        )

    def abort(self) -> None:
        """Closes all files as they are."""
        self._names.close()
        if self._shard is not None:
            self._shard.abort()
            self._shard = None


class _Shard:
    """An open tar file that hashes what goes through it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._stream = _HashingStream(self._file)
        # Time and owner are fixed, so that equal documents give equal bytes.
        self._tar = TarWriter(self._stream, user="", group="", mtime=0, compress=False)
        self.documents = 0
        self.tokens = 0

    def write(self, key: str, tokens: np.ndarray) -> int:
        """Appends a sample; returns the byte offset of its first token in the file."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, tokens, allow_pickle=False)
        payload = buffer.getvalue()
        start = self._tar.tarstream.offset + _TAR_HEADER
        self._tar.write({"__key__": key, "tokens.npy": payload})
        self.documents += 1
        self.tokens += len(tokens)
        return start + len(payload) - tokens.nbytes

    def close(self) -> ShardEntry:
        """Ends the tar file, on disk for good."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self.abort()
        return ShardEntry(
            self._path.name, size, self._stream.digest.hexdigest(), self.documents, self.tokens
        )

    def abort(self) -> None:
        """Closes the file as it is."""
        # An open tar stream would write to the closed file when it is collected.
        with suppress(OSError):
            self._tar.close()
        self._file.close()


class _HashingStream:
    """The part of a file that a tar stream writes to."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Hashes and writes."""
        self.digest.update(data)
        return self._file.write(data)
