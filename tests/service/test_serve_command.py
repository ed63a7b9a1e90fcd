"""The program itself, as a user starts it, under the load that `tools/load_sessions.py` makes."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

_PROGRAM = str(Path(sys.executable).with_name("ttt-megatron"))


@contextmanager
def _serving(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The program and its URL."""
    command = [_PROGRAM, "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if " at http" in line)
        yield process, re.search(r"http://\S+", line)[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_an_exported_run_says_what_generate_writes(trained_run, tmp_path):
    run, exported, book = str(trained_run.output), str(tmp_path / "whales"), tmp_path / "book"
    states = tmp_path / "states"
    states.mkdir()
    book.write_text("harpoon night ship sea whale " * 5)
    state = str(states / "book.state")
    prompt, continued = ("--prompt", "sea whale"), ("--prompt", "night", "--state", state)
    subprocess.run([_PROGRAM, "export", run, exported], check=True)
    subprocess.run([_PROGRAM, "read", book, "--model", run, "--save", state], check=True)
    with _serving(exported, "--states-dir", str(states)) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        asked = {"model": "whales", "temperature": 0, "max_tokens": 40}
        made = httpx.post(f"{url}/v1/sessions", json={"name": "book", "state": "book.state"})
        assert made.status_code == 201, made.text
        after_book = {"prompt": "night", "extra_body": {"session": "book"}}
        for options, request in ((prompt, {"prompt": "sea whale"}), (continued, after_book)):
            answer = client.completions.create(**asked, **request)
            assert answer.choices[0].text + "\n" == _generated(run, *options)


def _generated(run: str, *options: str) -> str:
    command = [_PROGRAM, "generate", run, *options, "--greedy", "--tokens", "40"]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


@pytest.mark.slow
def test_two_hundred_at_once_and_none_is_lost(export, tmp_path):
    folder = ("--session-dir", str(tmp_path / "sessions"), "--memory", "2MB")
    with _serving(str(export), *folder) as (process, url):
        tool = Path(__file__).parents[2] / "tools" / "load_sessions.py"
        load = [sys.executable, tool, url, "--requests", "200", "--sessions", "50", "--tokens", "8"]
        report = subprocess.run(load, capture_output=True, text=True, timeout=300)
        assert report.returncode == 0, report.stdout + report.stderr
        assert "200 of 200" in report.stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert len(list((tmp_path / "sessions").glob("*.safetensors"))) == 50
