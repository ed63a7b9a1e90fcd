"""An exported folder under `transformers serve` and in a pipeline, which hold no sessions."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import transformers
from model_thread import Asked, started


@pytest.fixture(scope="module")
def greedy(served):
    """What our service says to "a whale", 12 tokens."""
    service = started(served)
    text, _ = Asked(service, "a whale", max_tokens=12).result()
    service.close()
    return text


def test_a_pipeline_writes_the_same(export, greedy):
    pipe = transformers.pipeline(
        "text-generation", model=str(export), trust_remote_code=True, device="cpu"
    )
    made = pipe("a whale", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert made[0]["generated_text"] == greedy


@pytest.mark.slow
def test_transformers_serve_answers_openais_client(export, greedy, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [program, "serve", str(export), *options],
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health", process)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            asked = {"model": str(export), "prompt": "a whale", "max_tokens": 12, "temperature": 0}
            whole = client.completions.create(**asked)
            assert whole.choices[0].text == greedy
            assert whole.usage.prompt_tokens == 8
            pieces = [
                chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)
            ]
            assert "".join(pieces) == greedy
            assert len(pieces) > 2
            with pytest.raises(openai.UnprocessableEntityError):
                client.completions.create(**asked, extra_body={"session": "ann"})
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("transformers serve did not start")
