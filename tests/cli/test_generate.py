"""`generate` from a trained run: text on stdout, the summary on stderr."""

import io
import re
import sys

import pytest

from ttt_megatron.cli.main import main

PROMPT = "the whale and the ship at night, " * 8


def generate(capsys, run, *options):
    """stdout and stderr of `generate RUN OPTIONS…`, which must succeed."""
    assert main(["generate", str(run.output), "--device", "cpu", *options]) == 0
    return capsys.readouterr()


def steps_taken(captured):
    return int(re.search(r"([\d,]+) inner steps", captured.err).group(1).replace(",", ""))


def test_it_reads_the_prompt_and_goes_on_learning(trained_run, capsys):
    captured = generate(capsys, trained_run, "--prompt", PROMPT, "--tokens", "20", "--greedy")
    again = generate(capsys, trained_run, "--prompt", PROMPT, "--tokens", "20", "--greedy")
    assert captured.out == again.out
    assert len(captured.out) > 1
    # BOS and the prompt's bytes; a chunk of 8 is stepped on once the token after it is known.
    read = len(PROMPT) + 1
    generated = int(re.search(r"generated (\d+) tokens", captured.err).group(1))
    assert f"read {read} tokens" in captured.err
    assert steps_taken(captured) == (read + generated - 1) // 8
    assert "moved by 0.00%" not in captured.err


def test_without_inner_steps_nothing_moves(trained_run, capsys):
    options = ("--prompt", PROMPT, "--tokens", "5", "--no-inner-steps")
    captured = generate(capsys, trained_run, *options)
    assert steps_taken(captured) == 0
    assert "moved by 0.00%" in captured.err
    assert "kernels: torch (" in captured.err


def test_prompts_from_a_file_and_from_stdin_are_the_same(
    trained_run, capsys, tmp_path, monkeypatch
):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "é")
    options = ("--tokens", "12", "--seed", "4", "--top-k", "20", "--repetition-penalty", "1.2")
    from_file = generate(capsys, trained_run, "--prompt-file", str(file), *options)
    stdin = io.TextIOWrapper(io.BytesIO((PROMPT + "é").encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate(capsys, trained_run, *options).out == from_file.out
    stdin = io.TextIOWrapper(io.BytesIO((PROMPT + "é").encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate(capsys, trained_run, "--prompt-file", "-", *options).out == from_file.out
    other = generate(capsys, trained_run, "--prompt", PROMPT + "é", *options[:2], "--seed", "5")
    assert other.out != from_file.out


def test_an_empty_prompt_is_the_start_of_a_document(trained_run, capsys):
    captured = generate(capsys, trained_run, "--prompt", "", "--tokens", "0")
    assert captured.out == "\n"
    assert "read 1 tokens" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "-1"], "--tokens -1"),
        (["--temperature", "-2"], "--temperature -2"),
        (["--prompt-file", "nowhere.txt"], "prompt nowhere.txt cannot be read"),
    ],
)
def test_options_that_make_no_sense(trained_run, capsys, options, message):
    prompt = [] if "--prompt-file" in options else ["--prompt", "x"]
    assert main(["generate", str(trained_run.output), *prompt, *options]) == 2
    assert message in capsys.readouterr().err


def test_no_checkpoint_and_no_text(trained_run, capsys, tmp_path):
    assert main(["generate", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9")
    assert main(["generate", str(trained_run.output), "--prompt-file", str(file)]) == 2
    assert "latin1.txt is not UTF-8 text (byte 3)" in capsys.readouterr().err
