"""torchrun on a node, asked to end."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ttt_megatron.parallel.node import main, own_address

NODE = [sys.executable, "-m", "ttt_megatron.parallel.node", "--nnodes", "1", "--nproc-per-node"]
NODE += ["2", "--max-restarts", "3", "--shutdown-timeout", "60", "--no-python"]
SAVES = "trap 'sleep 2; touch saved-$RANK; exit 143' TERM; touch begun-$RANK; "
SAVES += "while :; do sleep 0.1; done"


def _until_begun(node: subprocess.Popen[Any], folder: Path) -> None:
    deadline = time.monotonic() + 200
    while len(list(folder.glob("begun-*"))) < 2:
        assert node.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_asked_twice_it_waits_for_its_processes_and_succeeds(tmp_path: Path) -> None:
    node = subprocess.Popen([*NODE, "bash", "-c", SAVES], cwd=tmp_path)
    _until_begun(node, tmp_path)
    for _ in range(2):
        node.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert node.wait(timeout=60) == 0
    assert len(list(tmp_path.glob("saved-*"))) == 2


@pytest.mark.slow
def test_a_process_that_does_not_end_in_time_is_a_failure(tmp_path: Path) -> None:
    stays = "trap '' TERM; touch begun-$RANK; while :; do sleep 0.1; done"
    at = NODE.index("--shutdown-timeout")
    impatient = [*NODE[: at + 1], "1", *NODE[at + 2 :]]
    node = subprocess.Popen(
        [*impatient, "bash", "-c", stays], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    _until_begun(node, tmp_path)
    node.send_signal(signal.SIGTERM)
    _, told = node.communicate(timeout=200)
    assert node.returncode == 1
    assert "a rank had not ended in the time given" in told


@pytest.mark.slow
def test_processes_have_an_hour_to_end_unless_said_otherwise(tmp_path: Path) -> None:
    at = NODE.index("--shutdown-timeout")
    usual = [*NODE[:at], *NODE[at + 2 :], "bash", "-c"]
    shown = "echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    for given, seconds in (({}, "3600"), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, "90")):
        told = subprocess.run(
            [*usual, shown],
            cwd=tmp_path,
            env={**environment, **given},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert told.stdout.split() == [seconds] * 2


def test_the_address_is_the_one_on_the_way_to_the_others() -> None:
    assert own_address("127.0.0.1:29400", alone=True) == "127.0.0.1"
    assert own_address("localhost:29400", alone=True) in ("127.0.0.1", "::1")
    with pytest.raises(OSError, match=r"not known|resolution"):
        own_address("nowhere.invalid:29400", alone=False)


@pytest.mark.parametrize(
    ("nodes", "address"), [("1", "127.0."), ("2", "node-1"), ("1:4", "node-1")]
)
def test_others_are_not_sent_to_their_own_loopback(
    nodes: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's own name means 127.0.1.1 on it, as Debian sets it up."""
    known = socket.getaddrinfo
    given: list[str] = []
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: known("127.0.1.1", *rest, **more)
    )
    monkeypatch.setattr("torch.distributed.run.main", given.extend)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for words in (
            ["--nnodes", nodes, "--rdzv-endpoint", "node-1:29400", "x.py"],
            [f"--nnodes={nodes}", "--rdzv_endpoint=node-1", "x.py", "--nnodes", "9"],
        ):
            given.clear()
            assert main(words) == 0
            assert given[given.index("--local-addr") + 1].startswith(address)
            assert given[-len(words) :] == words
            given.clear()
            assert main(["--local-addr=10.0.0.7", *words]) == 0
            assert "--local-addr" not in given, "what is said stands"
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
def test_a_process_that_fails_is_started_again_and_named(tmp_path: Path) -> None:
    fails = 'echo x >>started-$RANK; [ "$RANK" = 0 ] || exit 7; exec sleep 100'
    node = subprocess.run(
        [*NODE, "bash", "-c", fails], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert node.returncode == 1
    assert "rank 1 failed (exit status 7)" in node.stderr
    assert (tmp_path / "started-1").read_text() == "x\n" * 4
