"""Reading a prepared folder: any document, any part of it, without scanning."""

import json
import os
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import numpy as np

from ttt_megatron.data.index import DOCUMENT_DTYPE, Index, SplitEntry, check_file, read_index
from ttt_megatron.errors import PassingError, UserError

_OPEN_FILES = 32


def open_dataset(path: Path | str, split: str = "train", *, verify: bool = False) -> "TokenDataset":
    """Opens one split of the folder that `prepare` wrote.

    Sizes of all files and the hashes of the index and the tokenizer are always checked, every
    byte of the shards only with `verify`.

    Raises UserError naming the file that is missing, truncated or changed; of its kinds
    MissingDataError and PassingError as `read_index` and `check_file` do.
    """
    folder = Path(path)
    index = read_index(folder)
    if split not in index.splits:
        raise UserError(
            f"{folder} has no {split} split (it has {', '.join(index.splits)}): prepare it again "
            "with --validation or --validation-input"
        )
    entry = index.splits[split]
    for file in (entry.document_table, entry.name_table, *entry.shards):
        check_file(folder, file, verify=verify)
    return TokenDataset(folder, split, index)


class TokenDataset:
    """Tokenised documents of one split; each starts with BOS.

    Attributes:
        path: the folder.
        split: "train" or "validation".
        fingerprint: stands for tokenizer, tokens, order and split; equal folders, equal value.
        vocab_size: the tokenizer's.
        bos_id: the tokenizer's.
        num_documents: of the split.
        num_tokens: of the split.
        text_bytes: of the split.
    """

    def __init__(self, path: Path, split: str, index: Index) -> None:
        """`open_dataset` checks the files and calls this."""
        entry: SplitEntry = index.splits[split]
        self.path = path
        self.split = split
        self.fingerprint = index.fingerprint
        self.vocab_size = index.vocab_size
        self.bos_id = index.bos_id
        self.num_documents = entry.documents
        self.num_tokens = entry.tokens
        self.text_bytes = entry.text_bytes
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        self._names_path = path / entry.name_table.file
        self._shards = [path / shard.file for shard in entry.shards]
        table_path = path / entry.document_table.file
        try:
            self._table = np.load(table_path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise _lost(table_path, error) from error
        except ValueError as error:
            raise UserError(
                f"{table_path} cannot be read ({error}): restore it, or prepare the data again"
            ) from error
        if self._table.dtype != DOCUMENT_DTYPE or len(self._table) != entry.documents:
            raise UserError(
                f"{table_path} does not list the {entry.documents} documents of the index: "
                "restore it, or prepare the data again"
            )
        self._lock = threading.Lock()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.num_documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, BOS included, int64 [num_documents]."""
        return np.ascontiguousarray(self._table["length"])

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64 [num_documents]."""
        return np.ascontiguousarray(self._table["text_bytes"])

    @cached_property
    def names(self) -> list[str]:
        """Name of each document: its file, or its `id` in JSONL."""
        with open(self._names_path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    @property
    def bytes_per_token(self) -> float:
        """Text bytes a token, to turn nats a token into bits a byte."""
        return self.text_bytes / self.num_tokens

    def document(self, number: int) -> np.ndarray:
        """All tokens of a document, int64 [length]."""
        return self.read(number, 0, int(self._table["length"][number]))

    def read(self, number: int, start: int, count: int) -> np.ndarray:
        """`count` tokens of a document from token `start` on, int64 [count].

        Raises IndexError beyond the document, UserError if the shard has become shorter, and
        PassingError if it cannot be read any more.
        """
        shard, offset, length, _ = self._table[number].item()
        if start < 0 or count < 0 or start + count > length:
            raise IndexError(f"tokens {start} to {start + count} of a document of {length}")
        size = self._dtype.itemsize
        data = self._read_bytes(shard, offset + start * size, count * size)
        if len(data) != count * size:
            raise UserError(
                f"{self._shards[shard]} is truncated: restore it, or prepare the data again"
            )
        return np.frombuffer(data, self._dtype).astype(np.int64)

    def close(self) -> None:
        """Closes the shards that are open; reading opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _read_bytes(self, shard: int, offset: int, count: int) -> bytes:
        # pread rather than mmap: a shard that shrinks gives a short read, not SIGBUS. The lock
        # keeps another thread from closing the descriptor in between.
        with self._lock:
            try:
                data = os.pread(self._descriptor(shard), count, offset)
                while 0 < len(data) < count:  # Linux reads at most 2 GiB at once
                    more = os.pread(self._files[shard], count - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
            except OSError as error:
                raise _lost(self._shards[shard], error) from error
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]


def _lost(path: Path, error: OSError) -> PassingError:
    """For a file that `open_dataset` has seen: its file system fails, perhaps for a time."""
    return PassingError(
        f"{path} cannot be read any more ({error}): see that its file system is there, or restore "
        "the file"
    )
