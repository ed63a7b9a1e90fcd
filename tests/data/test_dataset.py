import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from ttt_megatron.data import dataset as dataset_module
from ttt_megatron.data.dataset import TokenDataset, open_dataset
from ttt_megatron.data.index import MissingDataError
from ttt_megatron.data.prepare import PrepareReport
from ttt_megatron.errors import PassingError, UserError


@pytest.fixture
def folder(prepared: PrepareReport, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(prepared.output, tmp_path / "data")


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip_byte(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        (old,) = file.read(1)
        file.seek(position)
        file.write(bytes([old ^ 1]))


def test_totals_and_parts_agree(train: TokenDataset) -> None:
    assert (
        train.num_tokens
        == train.lengths.sum()
        == sum(len(train.document(number)) for number in range(len(train)))
    )
    assert train.text_bytes == train.document_bytes.sum()
    # Byte tokens: one a byte, and BOS.
    np.testing.assert_array_equal(train.lengths, train.document_bytes + 1)
    longest = int(train.lengths.argmax())
    whole = train.document(longest)
    np.testing.assert_array_equal(train.read(longest, 5, 50), whole[5:55])
    with pytest.raises(IndexError):
        train.read(longest, 1, len(whole))


def test_few_files_stay_open(
    train: TokenDataset, prepared: PrepareReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "_OPEN_FILES", 2)
    fresh = open_dataset(prepared.output)
    for number in [*range(len(fresh)), *range(len(fresh))]:
        np.testing.assert_array_equal(fresh.document(number), train.document(number))
        assert len(fresh._files) <= 2
    assert len(fresh._shards) > 2


def test_a_copy_has_the_same_fingerprint(train: TokenDataset, folder: Path) -> None:
    assert open_dataset(folder, verify=True).fingerprint == train.fingerprint


def test_truncated_and_missing_shards(folder: Path) -> None:
    shard = folder / "train-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1000])
    with pytest.raises(UserError, match=r"train-00001\.tar is truncated"):
        open_dataset(folder)
    shard.write_bytes(data + b"\0")
    with pytest.raises(UserError, match=r"train-00001\.tar is longer"):
        open_dataset(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar is missing"):
        open_dataset(folder)


def test_a_shard_truncated_after_opening(folder: Path) -> None:
    dataset = open_dataset(folder)
    shard = folder / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match=r"train-00000\.tar is truncated"):
        dataset.document(3)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_system_that_fails_may_come_back(
    folder: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    dataset = open_dataset(folder)
    for owner, name in ((os, "pread"), (np, "load"), (Path, "read_bytes"), (Path, "stat")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(PassingError, match=os.strerror(number)):
                dataset.document(3) if name == "pread" else open_dataset(folder)


def test_data_that_is_gone_after_opening_may_come_back(folder: Path) -> None:
    """What was never there is a mistake."""
    dataset = open_dataset(folder)
    (folder / "train-00000.tar").unlink()
    with pytest.raises(PassingError, match=r"train-00000\.tar cannot be read any more"):
        dataset.document(3)
    with pytest.raises(MissingDataError) as told:
        open_dataset(folder)
    assert not isinstance(told.value, PassingError)


@pytest.mark.parametrize("name", ["train-00000.tar", "train.documents.npy", "train.names.jsonl"])
def test_changed_bytes_are_found_on_verification(folder: Path, name: str) -> None:
    path = folder / name
    flip_byte(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{name} was changed"):
        open_dataset(folder, verify=True)


@pytest.mark.parametrize("name", ["tokenizer.meta.json"])
def test_changed_tokenizers_are_always_found(folder: Path, name: str) -> None:
    flip_byte(folder / name, 30)
    with pytest.raises(UserError, match=r"the tokenizer files in .* were changed"):
        open_dataset(folder)


def test_changed_indices(folder: Path) -> None:
    original = (folder / "index.json").read_text()
    edit_index(folder, lambda index: index.update(vocab_size=300))
    with pytest.raises(UserError, match=r"index\.json was changed"):
        open_dataset(folder)
    edit_index(folder, lambda index: index.update(version=99))
    with pytest.raises(UserError, match="format version 99"):
        open_dataset(folder)
    (folder / "index.json").write_text(original[: len(original) // 2])
    with pytest.raises(UserError, match=r"index\.json cannot be parsed"):
        open_dataset(folder)
    (folder / "index.json").write_text("{}")
    with pytest.raises(UserError, match="not an index of prepared data"):
        open_dataset(folder)
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json is missing"):
        open_dataset(folder)


def test_an_unknown_split(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no test split \(it has train, validation\)"):
        open_dataset(folder, "test")
