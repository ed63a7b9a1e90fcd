import json
from pathlib import Path

import numpy as np
import pytest
from random_text import make_text
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from ttt_megatron.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    import_tokenizer,
    load_tokenizer,
    tokenizer_sha256,
    train_bpe,
)
from ttt_megatron.errors import UserError

TEXT = make_text(1, 300) + "\r\n\t  <|bos|> \x00 end"


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe((make_text(seed, 200) for seed in range(20)), 400)


def save_word_level(folder: Path, tokens: list[str]) -> Path:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = FastTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_survives_encoding_saving_and_decoding(
    kind: str, bpe: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    ids = loaded.encode(TEXT)
    assert loaded.decode(ids) == TEXT
    assert ids == tokenizer.encode(TEXT)
    assert (loaded.vocab_size, loaded.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)
    assert min(ids) >= 0
    assert max(ids) < loaded.vocab_size


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_only_the_document_start_is_bos(kind: str, bpe: HuggingFaceTokenizer) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokens = tokenizer.encode_document("a <|bos|> b")
    assert np.flatnonzero(tokens == tokenizer.bos_id).tolist() == [0]
    assert tokenizer.decode(tokens) == "a <|bos|> b"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_incomplete_utf8_becomes_a_replacement_character(
    kind: str, bpe: HuggingFaceTokenizer
) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    unseen = "a\U0001f600"
    assert tokenizer.decode(tokenizer.encode(unseen)[:-1]) == "a\ufffd"


def test_byte_ids_are_the_bytes() -> None:
    assert ByteTokenizer().encode("aß") == [97, 0xC3, 0x9F]
    assert (ByteTokenizer().vocab_size, ByteTokenizer().bos_id) == (257, 256)


def test_bpe_size_counts_everything_and_training_is_reproducible(
    bpe: HuggingFaceTokenizer,
) -> None:
    again = train_bpe((make_text(seed, 200) for seed in range(20)), 400)
    assert bpe.vocab_size == 400
    assert again.serialized() == bpe.serialized()
    assert len(bpe.encode(TEXT)) < len(TEXT.encode()) / 2


def test_the_hash_sees_every_change(bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    before = tokenizer_sha256(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("whale", "whelk"))
    assert tokenizer_sha256(tmp_path) != before


def test_ids_beyond_the_vocabulary_are_refused(bpe: HuggingFaceTokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        with pytest.raises(UserError, match="token id 100000 is outside"):
            tokenizer.decode([1, 100000])


@pytest.mark.parametrize(
    ("tokens", "config", "bos", "expected"),
    [
        (["<unk>", "a", "<s>"], None, None, 2),
        (["<unk>", "<|begin_of_text|>", "a"], None, None, 1),
        (["<unk>", "<s>", "<start>"], {"bos_token": "<start>"}, None, 2),
        (["<unk>", "<s>", "<start>"], {"bos_token": {"content": "<start>"}}, None, 2),
        (["<unk>", "<s>", "<go>"], {"bos_token": "<s>"}, "<go>", 2),
    ],
)
def test_bos_of_a_hugging_face_tokenizer(
    tmp_path: Path, tokens: list[str], config: dict | None, bos: str | None, expected: int
) -> None:
    path = save_word_level(tmp_path, tokens)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert import_tokenizer(path, bos).bos_id == expected
    assert import_tokenizer(tmp_path, bos).bos_id == expected


def test_tokenizers_without_bos_or_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*tokenizer\.json"):
        import_tokenizer(tmp_path)
    path = save_word_level(tmp_path, ["<unk>", "a"])
    with pytest.raises(UserError, match="name the token that opens documents with --bos"):
        import_tokenizer(path)
    with pytest.raises(UserError, match="no token '<x>'"):
        import_tokenizer(path, "<x>")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is not a Hugging Face tokenizer\.json"):
        import_tokenizer(path)
    with pytest.raises(UserError, match=r"tokenizer\.meta\.json is missing"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(iter(["a"]), 256)
