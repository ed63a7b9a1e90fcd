"""Tokenizers: raw bytes, or a local Hugging Face `tokenizer.json` with a BOS token."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from ttt_megatron.errors import UserError

META_FILE = "tokenizer.meta.json"
TOKENIZER_FILE = "tokenizer.json"
BOS_TOKEN = "<|bos|>"
KNOWN_BOS_TOKENS = (BOS_TOKEN, "<s>", "<|begin_of_text|>")
_META_FORMAT = "ttt-megatron-tokenizer-1"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: "bytes" or "huggingface".
        vocab_size: number of ids, the BOS included.
        bos_id: the id that opens every document.
        bytes_per_token: UTF-8 bytes a token of the training text this was saved with, or None.
    """

    kind: str
    vocab_size: int
    bos_id: int
    bytes_per_token: float | None = None

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as an int64 array [n], without BOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; special tokens vanish, incomplete UTF-8 becomes U+FFFD.

        Raises UserError for an id outside the vocabulary.
        """

    @abstractmethod
    def serialized(self) -> str | None:
        """Content of `tokenizer.json`, or None where the kind says all."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS."""
        return self.encode_array(text).tolist()

    def encode_document(self, text: str) -> np.ndarray:
        """BOS and the token ids of `text`, int64 [n + 1]."""
        return np.concatenate(([self.bos_id], self.encode_array(text)))

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id: uint16 or uint32, little endian."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def save(self, folder: Path | str) -> None:
        """Writes what `load_tokenizer` reads into the existing `folder`."""
        folder = Path(folder)
        meta = {
            "format": _META_FORMAT,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "bytes_per_token": self.bytes_per_token,
        }
        content = self.serialized()
        if content is not None:
            (folder / TOKENIZER_FILE).write_text(content, encoding="utf-8")
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise UserError(
                f"token id {outside[0]} is outside the tokenizer's {self.vocab_size} ids: "
                "decode with the tokenizer the model was trained with"
            )
        return array


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; 256 is BOS."""

    kind = "bytes"
    vocab_size = 257
    bos_id = 256

    def __init__(self, bytes_per_token: float | None = None) -> None:
        self.bytes_per_token = bytes_per_token

    def encode_array(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_array`."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        array = self._checked(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def serialized(self) -> None:
        """The kind says all."""
        return None


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` tokenizer; text that spells a special token is encoded as plain text."""

    kind = "huggingface"

    def __init__(
        self, content: str, bos_id: int, *, origin: str, bytes_per_token: float | None = None
    ) -> None:
        """`content` is a tokenizer.json; `origin` names it in errors."""
        try:
            self._tokenizer = FastTokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{origin} is not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells out "<|bos|>" must not forge a document boundary.
        self._tokenizer.encode_special_tokens = True
        self.bos_id = bos_id
        self.bytes_per_token = bytes_per_token
        # Ids may have holes, so the largest id counts, not their number.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_array(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode_array`."""
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode(self._checked(ids).tolist(), skip_special_tokens=True)

    def serialized(self) -> str:
        """Content of `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=False)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Loads the tokenizer that `Tokenizer.save` (so also `prepare`) left in `folder`.

    Raises UserError if the files are missing or unreadable.
    """
    folder = Path(folder)
    path = folder / META_FILE
    if not path.is_file():
        raise UserError(
            f"{path} is missing: give a folder written by `ttt-megatron prepare`, or one that "
            "holds a copy of its tokenizer files; a model imported with --tokenizer none has none"
        )
    meta = _read_json(path)
    if meta.get("format") != _META_FORMAT or meta.get("kind") not in ("bytes", "huggingface"):
        raise UserError(f"{path} is not a tokenizer description of this version: prepare again")
    if meta["kind"] == "bytes":
        return ByteTokenizer(meta["bytes_per_token"])
    file = folder / TOKENIZER_FILE
    return HuggingFaceTokenizer(
        _read_text(file),
        int(meta["bos_id"]),
        origin=str(file),
        bytes_per_token=meta["bytes_per_token"],
    )


def import_tokenizer(path: Path | str, bos: str | None = None) -> HuggingFaceTokenizer:
    """Reads a local Hugging Face tokenizer: a tokenizer.json or the folder that holds one.

    BOS is `bos`, else the `bos_token` of a tokenizer_config.json beside the file, else the first
    of `KNOWN_BOS_TOKENS` in the vocabulary.

    Raises UserError if there is no such file or no BOS.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"--tokenizer {path}: there is no {file}; give `bytes`, `bpe:SIZE`, a tokenizer.json "
            "or a folder that holds one (transformers' save_pretrained writes it)"
        )
    tokenizer = HuggingFaceTokenizer(_read_text(file), 0, origin=str(file))
    vocabulary = tokenizer._tokenizer.get_vocab(with_added_tokens=True)
    named = bos or _configured_bos(file.parent / "tokenizer_config.json")
    if named is not None and named not in vocabulary:
        raise UserError(f"{file} has no token {named!r} to use as BOS: name another with --bos")
    found = [token for token in ([named] if named else KNOWN_BOS_TOKENS) if token in vocabulary]
    if not found:
        raise UserError(
            f"{file} has none of the BOS tokens {', '.join(KNOWN_BOS_TOKENS)}, and no "
            "tokenizer_config.json names one: name the token that opens documents with --bos"
        )
    tokenizer.bos_id = vocabulary[found[0]]
    return tokenizer


def train_bpe(texts: Iterator[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE; `vocab_size` counts the 256 bytes and BOS.

    Text with too few distinct pairs gives fewer entries. Raises UserError below 257.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    check_bpe_size(vocab_size)
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    bos_id = tokenizer.get_vocab()[BOS_TOKEN]
    return HuggingFaceTokenizer(tokenizer.to_str(), bos_id, origin="the trained BPE")


def check_bpe_size(vocab_size: int) -> None:
    """Raises UserError for a vocabulary without room for 256 bytes and BOS."""
    if vocab_size < 257:
        raise UserError(
            f"--tokenizer bpe:{vocab_size} is too small: 256 bytes and BOS need at least 257"
        )


def tokenizer_sha256(folder: Path | str) -> str:
    """Hash over the tokenizer files in `folder`."""
    digest = hashlib.sha256()
    for name in (META_FILE, TOKENIZER_FILE):
        file = Path(folder) / name
        if file.is_file():
            digest.update(f"{name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _configured_bos(path: Path) -> str | None:
    if not path.is_file():
        return None
    token = _read_json(path).get("bos_token")
    return token.get("content") if isinstance(token, dict) else token


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value
