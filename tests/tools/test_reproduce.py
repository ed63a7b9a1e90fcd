"""The small reproduction's tools."""

import gzip
import json
import os
import subprocess
import sysconfig
from pathlib import Path

import cut_documents
import pytest

ROOT = Path(__file__).parents[2]


def write_documents(path, texts):
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def test_pieces_are_spread_over_documents(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    write_documents(source, ["abcdefghij" * 10, "short", "0123456789" * 3])
    words = [str(source), "--characters", "10", "--pieces", "4", "--output", str(output)]
    assert cut_documents.main(words) == 0
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    # Four of the first, from 0, 25, 50 and 75; none of the second; all three of the third.
    assert texts == ["abcdefghij", "fghijabcde", "abcdefghij", "fghijabcde", *["0123456789"] * 3]
    assert "7 pieces of 3 documents" in capsys.readouterr().out


def test_documents_that_are_all_too_short_are_refused(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    write_documents(source, ["short"])
    assert cut_documents.main([str(source), "--output", str(output)]) == 2
    assert "none of 1 documents has 20,000 characters" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_the_whole_of_it_runs_and_goes_on(tmp_path):
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join(path.read_text("utf-8", "ignore") for path in sorted(folder.glob("*.py")))
    size = 200_000
    documents = [text[start : start + size] for start in range(0, 8 * size, size)]
    write_documents(tmp_path / "train.jsonl.gz", documents[:6])
    write_documents(tmp_path / "held-out.jsonl.gz", documents[6:])
    command = ["bash", str(ROOT / "tools/reproduce.sh"), "train.jsonl.gz", "held-out.jsonl.gz"]
    chosen = {
        "SYSTEMS": "e2e gated_delta",
        "HEADLINE": "e2e",
        "SEEDS": "1 2",
        "TOY": "off",
        "SETTINGS": "training.steps=2 training.global_batch_size=2 training.micro_batch_size=1",
    }
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **chosen}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done") == 5
    report = (tmp_path / "reproduction" / "report" / "report.md").read_text()
    assert "| e2e | 1, 2 |" in report
    assert "gated_delta-seed1, off" in report
    assert (tmp_path / "reproduction" / "report-toy" / "report.png").is_file()
