"""The index of a prepared folder: what it holds, where, and the hashes that pin it.

index.json names every file with its size and SHA-256; its `fingerprint` is the SHA-256 of the rest
of the index, so it stands for the tokenizer, the tokens, their order and the split. Two side files
a split hold what grows with the number of documents: `<split>.documents.npy`, an array of
`DOCUMENT_DTYPE`, and `<split>.names.jsonl`, a JSON string a line.
"""

import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttt_megatron.data.tokenizer import tokenizer_sha256
from ttt_megatron.errors import PassingError, UserError

INDEX_FILE = "index.json"
FORMAT = "ttt-megatron-data"
VERSION = 1
SPLITS = ("train", "validation")

# shard: position in the split's list of shards; offset: of the first token in the tar, in bytes;
# length: tokens, BOS included; text_bytes: UTF-8 bytes of the text.
DOCUMENT_DTYPE = np.dtype(
    [("shard", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("text_bytes", "<i8")]
)


_RESTORE = "restore it, or prepare the data again"
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Beside those the file system itself fails: an input/output error, a stale handle, no answer.
_MISTAKES = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG})


class MissingDataError(UserError):
    """A file of prepared data is not there: a wrong path, or a file system that is not mounted."""


@dataclass(frozen=True)
class FileEntry:
    """A side file: name in the folder, size in bytes, SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A tar shard and how much it holds."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class SplitEntry:
    """One split: totals, shards in order, side files."""

    documents: int
    tokens: int
    text_bytes: int
    longest_document: int
    shards: tuple[ShardEntry, ...]
    document_table: FileEntry
    name_table: FileEntry


@dataclass(frozen=True)
class Index:
    """Content of index.json.

    Attributes:
        dtype: NumPy name of the stored tokens' type, "uint16" or "uint32" (little endian).
        tokenizer_sha256: `tokenizer_sha256` of the folder.
        fingerprint: hash over all the rest.
    """

    dtype: str
    vocab_size: int
    bos_id: int
    tokenizer_sha256: str
    splits: dict[str, SplitEntry]
    fingerprint: str


def write_index(
    folder: Path, *, dtype: str, vocab_size: int, bos_id: int, splits: dict[str, SplitEntry]
) -> Index:
    """Writes index.json over the files already in `folder`."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "bos_id": bos_id,
        "tokenizer_sha256": tokenizer_sha256(folder),
        "splits": {name: asdict(split) for name, split in splits.items()},
    }
    content["fingerprint"] = _fingerprint(content)
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return _parse(content)


def read_index(folder: Path | str) -> Index:
    """Reads index.json and checks its fingerprint and the tokenizer's hash.

    Raises MissingDataError if it is missing, UserError if it cannot be read, is of another version
    or changed, PassingError if the file system fails.
    """
    path = Path(folder) / INDEX_FILE
    missing = f"{path} is missing: data.path must be a folder written by `ttt-megatron prepare`"
    with _telling_of(path, missing):
        text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} cannot be parsed ({error}): prepare the data again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not an index of prepared data: check data.path")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {content.get('version')}, this program reads {VERSION}: "
            "prepare the data again"
        )
    if content.get("fingerprint") != _fingerprint(content):
        raise UserError(
            f"{path} was changed since it was written (its fingerprint does not match): restore "
            "it, or prepare the data again"
        )
    index = _parse(content)
    with _telling_of(Path(folder)):
        found = tokenizer_sha256(folder)
    if found != index.tokenizer_sha256:
        raise UserError(
            f"the tokenizer files in {folder} were changed or removed since the data was "
            "prepared: restore them, or prepare the data again"
        )
    return index


def check_file(folder: Path, entry: FileEntry, *, verify: bool) -> Path:
    """Path of `entry`'s file after checking its size and, with `verify`, its SHA-256.

    Raises MissingDataError naming the file if it is missing, UserError if it is truncated or
    changed, PassingError if the file system fails.
    """
    path = folder / entry.file
    with _telling_of(path):
        size = path.stat().st_size
    if size != entry.bytes:
        problem = "truncated" if size < entry.bytes else "longer than it was"
        raise UserError(
            f"{path} is {problem} ({size} bytes, the index says {entry.bytes}): restore it, or "
            "prepare the data again"
        )
    with _telling_of(path):
        changed = verify and file_sha256(path) != entry.sha256
    if changed:
        raise UserError(
            f"{path} was changed since it was written (its SHA-256 differs from the index): "
            "restore it, or prepare the data again"
        )
    return path


@contextmanager
def _telling_of(path: Path, missing: str | None = None) -> Iterator[None]:
    """Turns an OSError about a file into the UserError it is; `missing` says that there is none."""
    try:
        yield
    except _NOT_THERE as error:
        raise MissingDataError(missing or f"{path} is missing: {_RESTORE}") from error
    except OSError as error:
        kind = UserError if error.errno in _MISTAKES else PassingError
        raise kind(f"{path} cannot be read ({error}): {_RESTORE}") from error


def file_entry(path: Path) -> FileEntry:
    """Describes an existing file."""
    return FileEntry(path.name, path.stat().st_size, file_sha256(path))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "fingerprint"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(content: dict[str, Any]) -> Index:
    splits = {
        name: SplitEntry(
            **{
                **split,
                "shards": tuple(ShardEntry(**shard) for shard in split["shards"]),
                "document_table": FileEntry(**split["document_table"]),
                "name_table": FileEntry(**split["name_table"]),
            }
        )
        for name, split in content["splits"].items()
    }
    rest = {
        key: content[key]
        for key in ("dtype", "vocab_size", "bos_id", "tokenizer_sha256", "fingerprint")
    }
    return Index(splits=splits, **rest)
