import argparse
from pathlib import Path

import pytest

from ttt_megatron.cli import prepare as command
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.errors import UserError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_prepares_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    (source / "skipped").mkdir(parents=True)
    for number in range(20):
        (source / f"{number}.md").write_text("word " * (number + 1))
    (source / "skipped" / "x.md").write_text("not this")
    (source / "y.txt").write_text("nor this")
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--tokenizer", "bpe:260", "--validation", "0.3"]
    filters = ["--include", "*.md", "--exclude", "skipped"]
    assert run(str(source), *arguments, *filters) == 0
    captured = capsys.readouterr()
    train, validation = open_dataset(output), open_dataset(output, "validation")
    assert len(train) + len(validation) == 20
    for dataset in (train, validation):
        assert f"{dataset.num_tokens:,}" in captured.out
        assert f"{dataset.text_bytes:,}" in captured.out
    assert f"{output}/train-00000.tar" in captured.out
    assert "tokenize" in captured.err
    assert "100%" in captured.err


def test_held_out_files(tmp_path: Path) -> None:
    train, held_out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text('{"body": "text"}\n')
    held_out.write_text('{"body": "held out"}\n')
    output = tmp_path / "out"
    run(
        str(train),
        *("--validation-input", str(held_out), "--text-field", "body", "--output", str(output)),
    )
    assert open_dataset(output, "validation").names == ["b.jsonl:1"]
    with pytest.raises(UserError, match="--overwrite"):
        run(str(train), "--output", str(output))
