import gzip
import json
from pathlib import Path

import pytest

from ttt_megatron.data.sources import (
    NotUtf8Error,
    SourceFile,
    find_files,
    raw_documents,
    read_document,
)
from ttt_megatron.errors import UserError


def read_all(path: Path, text_field: str = "text") -> list[tuple[str, str]]:
    return [read_document(raw, text_field) for raw in raw_documents(find_files([path]))]


def write_lines(path: Path, *lines: str) -> Path:
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.py", "a/z.py", "a/y.txt", "a/deep/x.py", ".git/c.py", ".hidden.py", "out/o.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], ["a/deep/x.py", "a/y.txt", "a/z.py", "b.py"]),
        (["*.py"], [], ["a/deep/x.py", "a/z.py", "b.py"]),
        (["*.py"], ["a/deep"], ["a/z.py", "b.py"]),
        (["*.py"], ["a/deep/"], ["a/z.py", "b.py"]),
        ([], ["x.py", "*.txt"], ["a/z.py", "b.py"]),
        (["a/*"], [], ["a/deep/x.py", "a/y.txt", "a/z.py"]),
    ],
)
def test_folders_are_listed_sorted_and_filtered(
    tree: Path, include: list[str], exclude: list[str], expected: list[str]
) -> None:
    files = find_files([tree], include=include, exclude=exclude, skip=tree / "out")
    assert [file.name for file in files] == expected


def test_inputs_that_are_not_there_are_refused(tree: Path) -> None:
    for item, message in [
        ("https://host/x.txt", "https://host/x.txt is not a local path"),
        (tree / "nothing", "nothing does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            find_files([item])
    with pytest.raises(UserError, match=r"holds no files that pass --include \*\.rs"):
        find_files([tree], include=["*.rs"])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"id": "first", "body": "é\n"}), "", json.dumps({"body": "second"})]
    path = write_lines(tmp_path / f"books{suffix}", *lines)
    assert read_all(path, "body") == [("first", "é\n"), (f"books{suffix}:3", "second")]
    raw = list(raw_documents(find_files([path])))
    assert 0 < sum(document.consumed for document in raw) <= path.stat().st_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"broken JSON .* every line must be an object"),
        ("[1]", "a JSON list"),
        ('{"body": "x"}', "field 'text' is missing; the fields are 'body'"),
        ('{"text": 3}', "field 'text' is not a string"),
        ('{"text": "\\ud800"}', "field 'text' holds a lone surrogate at character 0"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", '{"text": "fine"}', line)
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2: {message}"):
        read_all(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"gr\xf6\xdfe")
    with pytest.raises(NotUtf8Error, match=r"latin\.txt is not UTF-8 text \(byte 2\)"):
        read_all(text)
    lines = tmp_path / "latin.jsonl"
    lines.write_bytes(b'{"text": "fine"}\n{"text": "gr\xf6"}\n')
    with pytest.raises(NotUtf8Error, match=r"latin\.jsonl, line 2 is not UTF-8"):
        read_all(lines)


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl.gz", *(json.dumps({"text": str(n)}) for n in range(9)))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz cannot be read after line"):
        read_all(path)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    source = SourceFile(tmp_path / "gone.txt", "gone.txt", None, 1)
    (raw,) = raw_documents([source])
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        read_document(raw, "text")
