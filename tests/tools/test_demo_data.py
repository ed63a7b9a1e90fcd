"""How the demo chooses packing, evaluation length and prompt from its prepared text."""

import random

import demo_data
import pytest

from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.errors import UserError


def prepared(root, words):
    """40 documents of `words` words each, at byte level; a fifth held out."""
    source = root / "text"
    source.mkdir()
    generator = random.Random(0)
    for number in range(40):
        text = " ".join(generator.choices(("ship", "sea", "sail"), k=words))
        (source / f"{number:02d}.txt").write_text(text)
    data = root / "data"
    prepare(PrepareOptions(inputs=(str(source),), output=str(data), validation=0.2, workers=1))
    return data


def test_long_documents_are_read_in_spans_short_ones_end_to_end(tmp_path):
    data = prepared(tmp_path, words=40)
    assert demo_data.choose_lengths(data, 64) == ("spans", 64)
    assert demo_data.choose_lengths(data, 512) == ("concatenate", 0)
    with pytest.raises(UserError, match="give more text"):
        demo_data.choose_lengths(data, 10_000)


def test_the_prompt_is_the_start_of_a_held_out_document(tmp_path, monkeypatch, capsys):
    data = prepared(tmp_path, words=40)
    prompt = demo_data.held_out_text(data, 33)
    assert len(prompt) == 32
    starts = [path for path in (tmp_path / "text").iterdir() if path.read_text()[:32] == prompt]
    assert len(starts) == 1
    held_out = (data / "validation.names.jsonl").read_text()
    assert f'"{starts[0].name}"' in held_out
    # Where no document is that long, the longest one's whole text.
    assert len(demo_data.held_out_text(data, 10_000)) > 100
    monkeypatch.setattr("sys.argv", ["demo_data", "prompt", str(data), "33"])
    assert demo_data.main() == 0
    assert capsys.readouterr().out == prompt
