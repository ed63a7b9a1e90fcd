import dataclasses
import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from random_text import make_text

from ttt_megatron.data import encode
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.prepare import (
    PrepareOptions,
    PrepareProgress,
    PrepareReport,
    prepare,
    split_of,
)
from ttt_megatron.data.tokenizer import load_tokenizer, train_bpe
from ttt_megatron.errors import UserError


def options(inputs: Path | list[Path], output: Path, **changes: object) -> PrepareOptions:
    paths = inputs if isinstance(inputs, list) else [inputs]
    base = PrepareOptions(inputs=tuple(map(str, paths)), output=str(output), workers=1)
    return dataclasses.replace(base, **changes)


def texts_of(folder: Path) -> dict[str, str]:
    tokenizer = load_tokenizer(folder)
    found = {}
    for split in ("train", "validation"):
        dataset = open_dataset(folder, split, verify=True)
        for number, name in enumerate(dataset.names):
            tokens = dataset.document(number)
            assert tokens[0] == tokenizer.bos_id
            assert not (tokens[1:] == tokenizer.bos_id).any()
            found[name] = tokenizer.decode(tokens)
    return found


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path: Path, records: list[dict]) -> Path:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:500", "file"])
def test_every_document_comes_back(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    if tokenizer == "file":
        train_bpe(iter([make_text(0, 500)]), 300).save(tmp_path)
        tokenizer = str(tmp_path / "tokenizer.json")
    report = prepare(options(corpus, tmp_path / "out", tokenizer=tokenizer, validation=0.3))
    expected = {
        path.relative_to(corpus).as_posix(): path.read_bytes().decode()
        for path in corpus.rglob("*.txt")
    }
    assert texts_of(report.output) == expected
    total = sum(split.text_bytes for split in report.index.splits.values())
    assert total == sum(len(text.encode()) for text in expected.values())
    loaded = load_tokenizer(report.output)
    train = open_dataset(report.output)
    assert loaded.bytes_per_token == train.bytes_per_token
    assert train.vocab_size == loaded.vocab_size


def test_json_lines_and_texts_mix(tmp_path: Path) -> None:
    records = [{"id": f"book{n}", "body": make_text(n, 50)} for n in range(12)]
    lines = write_jsonl(tmp_path / "books.jsonl.gz", records)
    text = tmp_path / "one.md"
    text.write_text("a text by itself")
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"body": "held out"}])
    report = prepare(
        options(
            [lines, text],
            tmp_path / "out",
            text_field="body",
            validation_inputs=(str(held_out),),
        )
    )
    expected = {record["id"]: record["body"] for record in records}
    expected |= {"one.md": "a text by itself", "held.jsonl:1": "held out"}
    assert texts_of(report.output) == expected
    assert open_dataset(report.output, "validation").names == ["held.jsonl:1"]


def test_the_number_of_workers_leaves_no_trace(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small batches, so that several are in flight.
    monkeypatch.setattr(encode, "_BATCH_BYTES", 2000)
    common = {"tokenizer": "bpe:400", "shard_tokens": 3000}
    one = prepare(options(corpus, tmp_path / "one", **common))
    three = prepare(options(corpus, tmp_path / "three", workers=3, **common))
    assert one.index.fingerprint == three.index.fingerprint
    assert folder_bytes(one.output) == folder_bytes(three.output)
    assert len(one.index.splits["train"].shards) > 2


def test_shards_are_webdatasets(prepared: PrepareReport) -> None:
    split = prepared.index.splits["train"]
    paths = [str(prepared.output / shard.file) for shard in split.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode())
    dataset = open_dataset(prepared.output)
    assert len(samples) == len(dataset) == split.documents
    for number, sample in enumerate(samples):
        assert sample["tokens.npy"].dtype == np.uint16
        np.testing.assert_array_equal(sample["tokens.npy"], dataset.document(number))
    for shard, path in zip(split.shards, paths, strict=True):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert len(members) == shard.documents
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
        assert shard.tokens <= 5000 or shard.documents == 1


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<s>": 0, **{f"w{n}": n for n in range(1, 70000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = tmp_path / "x.txt"
    text.write_text("w69999 w2")
    report = prepare(
        options(text, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"), validation=0)
    )
    assert report.index.dtype == "uint32"
    assert open_dataset(report.output).document(0).tolist() == [0, 69999, 2]


def test_the_split_is_by_name_and_seed(corpus: Path, tmp_path: Path) -> None:
    names = [f"doc{n}" for n in range(4000)]
    share = sum(split_of(name, 3, 0.1) == "validation" for name in names) / len(names)
    assert 0.08 < share < 0.12
    assert any(split_of(name, 3, 0.1) != split_of(name, 4, 0.1) for name in names)
    first = prepare(options(corpus, tmp_path / "a"))
    # Another text beside them moves none of the others to the other split.
    (tmp_path / "extra.txt").write_text("more")
    second = prepare(options([corpus, tmp_path / "extra.txt"], tmp_path / "b"))
    kept = set(open_dataset(first.output, "validation").names)
    assert kept == set(open_dataset(second.output, "validation").names) - {"extra.txt"}


def test_progress_reaches_its_total(corpus: Path, tmp_path: Path) -> None:
    seen: list[PrepareProgress] = []
    prepare(options(corpus, tmp_path / "out", tokenizer="bpe:300"), seen.append)
    assert [state.phase for state in seen] == sorted(
        (state.phase for state in seen), key=["train tokenizer", "tokenize"].index
    )
    last = {state.phase: state for state in seen}
    assert all(state.consumed == state.total > 0 for state in last.values())
    assert last["tokenize"].documents == 40


def test_empty_and_undecodable_documents_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "empty.txt").write_text("")
    (source / "latin.txt").write_bytes(b"\xff")
    (source / "text.txt").write_text("text")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        prepare(options(source, tmp_path / "out", validation=0))
    report = prepare(options(source, tmp_path / "out", validation=0, non_utf8="skip"))
    assert (report.empty_documents, report.non_utf8_documents) == (1, 1)
    assert open_dataset(report.output).names == ["text.txt"]


def test_errors_in_worker_processes_arrive_and_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: broken JSON"):
        prepare(options([corpus, bad], tmp_path / "new" / "out", workers=2))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 1.0}, "--validation 1.0 must be at least 0 and below 1"),
        ({"tokenizer": "bpe:many"}, "must be a whole number, as in bpe:4096"),
        ({"tokenizer": "bpe:100"}, "at least 257"),
        ({"tokenizer": "nowhere"}, "--tokenizer nowhere: there is no nowhere"),
        ({"bos": "<s>"}, "--bos <s>: --tokenizer bytes brings its own"),
        ({"workers": 0}, "--workers 0"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"validation": 0.001}, "none of the 40 documents .* fell in the validation split"),
        ({"validation": 0.9999}, "no document of .* fell in the training split"),
    ],
)
def test_impossible_options(
    corpus: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(options(corpus, tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_empty_input_and_a_file_in_both_splits(corpus: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match=r"every document in .*empty\.txt is empty"):
        prepare(options(empty, tmp_path / "out"))
    with pytest.raises(UserError, match=r"every document in .*empty\.txt is empty"):
        prepare(options(corpus, tmp_path / "out", validation_inputs=(str(empty),)))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder holds no files"):
        prepare(options(tmp_path / "folder", tmp_path / "out"))
    inside = corpus / "part0" / "text03.txt"
    with pytest.raises(UserError, match=r"text03\.txt is both an input and a --validation-input"):
        prepare(options(corpus, tmp_path / "out", validation_inputs=(str(inside),)))
    assert not (tmp_path / "out").exists()


def test_an_output_is_replaced_only_when_asked_and_only_if_ours(
    corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    first = prepare(options(corpus, output))
    with pytest.raises(UserError, match="replace it with --overwrite"):
        prepare(options(corpus, output))
    second = prepare(options(corpus, output, overwrite=True, seed=5))
    assert first.index.fingerprint != second.index.fingerprint
    assert open_dataset(output).fingerprint == second.index.fingerprint
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(UserError, match="holds other things"):
        prepare(options(corpus, corpus, overwrite=True))
