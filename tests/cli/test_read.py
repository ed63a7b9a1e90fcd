"""`read` keeps what a document taught, and `generate` goes on from it as if it had just read it."""

import io
import os
import random
import re
import signal
import sys
import time

import pytest
import torch

from ttt_megatron.cli.loaded_model import load_model
from ttt_megatron.cli.main import main
from ttt_megatron.hf.state_ttt_e2e import read_state_info
from ttt_megatron.serving.generation import TextStream, generate
from ttt_megatron.serving.sampling import Sampler, SamplingSettings
from ttt_megatron.serving.session import Session

WORDS = random.Random(5).choices(("sea", "whale", "ship", "harpoon", "night"), k=60)
DOCUMENT = " ".join(WORDS) + " é\r\n"
PROMPT = "the whale"


@pytest.fixture
def document(tmp_path):
    """The document as a file."""
    path = tmp_path / "book.txt"
    path.write_bytes(DOCUMENT.encode())
    return path


def run(*argv):
    return main([str(part) for part in argv])


def read(run_, document, state, *options):
    """`read DOCUMENT --model RUN --save STATE OPTIONS…`."""
    return run(
        "read", document, "--model", run_.output, "--save", state, "--device", "cpu", *options
    )


def continued(run_, capsys, *options):
    """The text that `generate RUN OPTIONS…` prints, and its summary."""
    capsys.readouterr()
    options = (*options, "--device", "cpu", "--tokens", "30", "--seed", "3")
    assert run("generate", run_.output, *options) == 0
    return capsys.readouterr()


def expected_text(run_, prompt, **options):
    """What a session continues that reads the document, then the prompt, and saves nothing."""
    loaded = load_model(str(run_.output), "cpu")
    session = Session(loaded.learner, bos_id=loaded.tokenizer.bos_id, **options)
    for ids in (loaded.tokenizer.encode_document(DOCUMENT), loaded.tokenizer.encode_array(prompt)):
        if len(ids):
            session.prefill(torch.from_numpy(ids).unsqueeze(0))
    sampler = Sampler(SamplingSettings(), 3, loaded.tokenizer.vocab_size)
    stream, text = TextStream(loaded.tokenizer.decode), ""
    for token in generate(session, sampler, 30):
        if int(token) == loaded.tokenizer.bos_id:
            break
        text += stream.push(int(token))
    return text + stream.finish() + "\n", session


def test_a_document_read_once_goes_on_as_if_just_read(trained_run, document, capsys, tmp_path):
    state = tmp_path / "book.state"
    assert read(trained_run, document, state) == 0
    summary = capsys.readouterr().out
    length = len(DOCUMENT.encode()) + 1
    assert f"read {length:,} tokens at" in summary
    assert f"{length:,} in all; {(length - 1) // 8} inner steps" in summary
    assert "moved by 0.00%" not in summary
    assert "fast weights exact\n" in summary
    before = state.read_bytes()
    for prompt in (PROMPT, ""):
        text, session = expected_text(trained_run, prompt)
        captured = continued(trained_run, capsys, "--state", state, "--prompt", prompt)
        assert captured.out == text
        assert (
            f"went on from token {length:,} of {state}, read {len(prompt)} tokens" in captured.err
        )
        assert f"{session.steps_taken} inner steps" in captured.err
    # No prompt is the empty one: stdin is not waited for.
    assert continued(trained_run, capsys, "--state", state).out == text
    assert state.read_bytes() == before
    penalised = continued(trained_run, capsys, "--state", state, "--repetition-penalty", "9")
    assert penalised.out != text
    assert text != continued(trained_run, capsys, "--prompt", "").out


def test_reading_goes_on_from_a_state(trained_run, document, capsys, tmp_path, monkeypatch):
    part, whole, again = tmp_path / "part", tmp_path / "whole", tmp_path / "again"
    first = tmp_path / "first.txt"
    first.write_text(DOCUMENT[:129])
    rest = io.TextIOWrapper(io.BytesIO(DOCUMENT[129:].encode()), encoding="ascii")
    assert read(trained_run, first, part) == 0
    monkeypatch.setattr(sys, "stdin", rest)
    assert read(trained_run, "-", again, "--state", part) == 0
    assert read(trained_run, document, whole) == 0
    total = len(DOCUMENT.encode()) + 1
    assert f"{total - 130:,} tokens at" in capsys.readouterr().out.splitlines()[1]
    infos = [read_state_info(path) for path in (again, whole)]
    assert infos[0]["position"] == infos[1]["position"] == total
    assert infos[0]["drift"] == pytest.approx(infos[1]["drift"], 1e-4)
    assert infos[0]["created_by"].startswith("ttt-megatron ")


@pytest.mark.parametrize("change", ["bf16", "rank:2"])
def test_a_smaller_state_says_what_it_lost(trained_run, document, capsys, tmp_path, change):
    exact, small = tmp_path / "exact", tmp_path / "small"
    assert read(trained_run, document, exact) == 0
    assert read(trained_run, document, small, "--change", change) == 0
    printed = capsys.readouterr().out
    error = float(re.search(rf"fast weights {change} \(off by ([\d.]+)% of", printed).group(1))
    assert error == pytest.approx(100 * read_state_info(small)["error"], abs=0.01)
    assert 0.05 < error < 100
    assert small.stat().st_size < exact.stat().st_size
    assert len(continued(trained_run, capsys, "--state", small).out) > 1


def test_without_inner_steps(trained_run, document, capsys, tmp_path):
    state = tmp_path / "plain"
    assert read(trained_run, document, state, "--no-inner-steps") == 0
    assert "0 inner steps, fast weights moved by 0.00%" in capsys.readouterr().out
    text, _ = expected_text(trained_run, PROMPT, inner_steps=False)
    options = ("--state", state, "--prompt", PROMPT)
    assert continued(trained_run, capsys, *options).out == text
    assert continued(trained_run, capsys, *options, "--no-inner-steps").out == text


def test_states_that_cannot_be_used(trained_run, document, capsys, tmp_path):
    state, model = tmp_path / "book.state", ("--device", "cpu", "--state")
    assert read(trained_run, document, state) == 0
    for argv, message in [
        (("generate", trained_run.control, *model, state), "belongs to another base model"),
        (("generate", trained_run.output, *model, document), "is no state file"),
        (("generate", trained_run.output, *model, "none"), "state none cannot be read"),
        (("generate", trained_run.output, "--no-inner-steps", *model, state), "--no-inner-steps"),
    ]:
        assert run(*argv) == 2
        assert message in capsys.readouterr().err
    damaged = bytearray(state.read_bytes())
    damaged[-9] ^= 4
    state.write_bytes(damaged)
    assert run("generate", trained_run.output, *model, state) == 2
    assert "its SHA-256 differs" in capsys.readouterr().err
    assert read(trained_run, document, tmp_path / "more", "--state", state) == 2
    assert not (tmp_path / "more").exists()


def test_documents_that_are_no_text(trained_run, capsys, tmp_path):
    for name, content, message in [
        ("empty.txt", b"", "empty.txt is empty: give a text"),
        ("latin1.txt", b"caf\xe9", "latin1.txt is not UTF-8 text (byte 3)"),
        ("image.bin", "é\0x".encode(), "image.bin is no text (byte 2 is NUL)"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert read(trained_run, tmp_path / name, tmp_path / "state") == 2
        assert message in capsys.readouterr().err
    for path, message in [
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ]:
        assert read(trained_run, path, tmp_path / "state") == 2
        assert f"document {path} cannot be read ({message})" in capsys.readouterr().err


def test_places_that_cannot_be_written_are_told_before_the_reading(
    trained_run, document, capsys, tmp_path
):
    # The model is loaded after these checks: a run that is not there is not reached.
    model = ("--model", tmp_path / "no-model")
    other = tmp_path / "other.txt"
    other.write_text("mine")
    for place, options, message in [
        (tmp_path / "no" / "state", (), f"there is no folder {tmp_path / 'no'}"),
        (tmp_path, (), "is a folder: name a file in it"),
        (document, ("--force",), "is the document itself"),
        (other, (), "exists: choose another file, or replace it with --force"),
        (other, ("--force",), "holds something other than a state"),
        (tmp_path / ("x" * 260), (), "cannot be written (File name too long)"),
        ("/proc/state", (), "cannot be written"),
        (tmp_path / "state", ("--change", "rank:none"), "--change 'rank:none' is unknown"),
        (tmp_path / "state", (), "no-model is no folder"),
    ]:
        assert run("read", document, *model, "--save", place, *options) == 2
        assert message in capsys.readouterr().err
    assert other.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "other.txt"]


def test_an_older_state_is_replaced_if_asked(trained_run, document, capsys, tmp_path):
    state = tmp_path / "state"
    assert read(trained_run, document, state) == 0
    position = read_state_info(state)["position"]
    assert read(trained_run, document, state, "--state", state) == 2
    assert "--force" in capsys.readouterr().err
    assert read(trained_run, document, state, "--state", state, "--force") == 0
    # Its continuation has no BOS of its own.
    assert read_state_info(state)["position"] == 2 * position - 1


def test_an_interrupted_reading_leaves_nothing(trained_run, tmp_path):
    book = tmp_path / "long.txt"
    book.write_text(DOCUMENT * 20_000)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(read(trained_run, book, tmp_path / "state"))
    time.sleep(2)
    os.kill(pid, signal.SIGINT)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert list(tmp_path.iterdir()) == [book]
