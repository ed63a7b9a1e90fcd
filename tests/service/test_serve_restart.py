"""What stays when a service ends, is killed, or has no room."""

import resource
import signal

import openai
import pytest
from serving_process import Serving


@pytest.fixture
def start(tmp_path):
    """Starts services, and ends those that still run."""
    running: list[Serving] = []

    def begin(export, *options: str) -> Serving:
        folder = ("--session-dir", str(tmp_path / "sessions"))
        running.append(Serving(tmp_path / f"log{len(running)}", export, *folder, *options))
        return running[-1]

    yield begin
    for serving in running:
        serving.close()


def _talk(server: Serving, name: str, parts: list[str]) -> list[str]:
    return [server.complete(part, name, max_tokens=11).choices[0].text for part in parts]


def test_a_restart_in_between_changes_nothing(start, export, other_export, tmp_path):
    parts = ["Call me Ishmael. ", "Some years ago ", "never mind how long "]
    first = start(export)
    whole = _talk(first, "whole", parts)
    begun = _talk(first, "s", parts[:2])
    assert first.end() == 0
    second = start(export)
    told = second.sessions()["s"]
    assert told["where"] == "disk"
    assert told["saved"] is True
    assert begun + _talk(second, "s", parts[2:]) == whole
    # A service in the same folder is refused while the first lives.
    twin = start(export)
    assert twin.url is None
    assert "used by another service" in twin.log.read_text()
    assert twin.status == 2
    assert second.end(signal.SIGINT) == 0
    assert "Traceback" not in second.log.read_text()
    # Another model refuses the session and goes on.
    third = start(other_export, "--model-name", "tiny")
    with pytest.raises(openai.ConflictError, match="another base model"):
        third.complete("go on", "s")
    assert third.sessions()["s"]["where"] == "refused"
    assert third.complete("go on", "fresh").usage.completion_tokens > 0
    assert third.end() == 0
    (tmp_path / "sessions" / "s.safetensors").write_bytes(b"damaged")
    fourth = start(export)
    with pytest.raises(openai.ConflictError, match="damaged"):
        fourth.complete("go on", "s")
    assert fourth.complete("go on", "whole").usage.prompt_tokens == 5


def test_killed_it_has_what_was_saved(start, export, tmp_path):
    first = start(export, "--save-every-request")
    texts = _talk(first, "s", ["one ", "two "])
    stream = first.complete("three ", "s", max_tokens=5000, stream=True)
    next(iter(stream))
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    half = tmp_path / "sessions" / f".s.safetensors.{'0' * 32}.tmp"
    half.write_bytes(b"half")
    second = start(export)
    assert not half.exists()
    assert second.sessions()["s"]["position"] == 1 + 8 + 22
    again = _talk(second, "s", ["three "])
    assert _talk(second, "t", ["one ", "two ", "three "]) == texts + again


def test_a_full_disk_loses_nothing(start, export):
    server = start(export, "--save-every-request")
    _talk(server, "s", ["one "])
    unlimited = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    with pytest.raises(openai.APIStatusError, match="cannot be written") as full:
        server.complete("two ", "s")
    assert full.value.status_code == 507
    told = server.sessions()["s"]
    assert (told["where"], told["saved"]) == ("memory", False)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, unlimited)
    server.complete("", "s", max_tokens=0)
    assert server.sessions()["s"]["saved"] is True
    assert server.sessions()["s"]["position"] == 1 + 4 + 11 + 4 + 8
    assert server.end() == 0


def test_what_cannot_be_served_is_told_in_a_sentence(start, export, tmp_path):
    running = start(export)
    port = running.url.rsplit(":", 1)[1]
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    for path in export.iterdir():
        if path.is_file():
            content = path.read_bytes()
            (broken / path.name).write_bytes(
                content[:-50] if path.suffix == ".safetensors" else content
            )
    elsewhere = ("--session-dir", str(tmp_path / "elsewhere"))
    cases = [
        (start(export, "--port", port), f"--port {port} cannot be used"),
        (start(empty, *elsewhere), "config.json cannot be read"),
        (start(broken, *elsewhere), "cannot be loaded"),
    ]
    for ended, told in cases:
        assert ended.url is None
        text = ended.log.read_text()
        assert told in text
        assert "Traceback" not in text
        assert ended.status == 2
