"""Two network namespaces as two nodes, with addresses and names of their own; one is cut off.

The launch is that of the job script: torchrun on each, meeting at the first one's address.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cluster.cluster_case import make_data, write_recipe

from ttt_megatron.cluster.outcome import FINISHED, read_outcome
from ttt_megatron.training.checkpoint_folder import resolve_checkpoint
from ttt_megatron.training.weights import read_weights

pytestmark = pytest.mark.netns
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SECONDS = 900


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces that a cable connects, `cable` at both ends."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"ttt-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            _ip(f"netns add {name}")
            _ip(f"-n {name} link set lo up")
        _ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip(f"-n {name} addr add {address}/24 dev cable")
            _ip(f"-n {name} link set cable up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


class _Node:
    """A node's torchrun, which is started again when it has ended without success."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self._name, self._address, self._folder = name, address, folder
        self.log = folder / f"{address}.log"
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        launch = [sys.executable, "-m", "ttt_megatron.parallel.node", "--nnodes", "2"]
        launch += ["--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        launch += ["--rdzv-id", "two-nodes", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400"]
        launch += ["-m", "ttt_megatron.cli.main", "train"]
        launch += ["recipe.yaml", "--outcome", str(self._folder / "outcome")]
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self._address]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self._name, *named, *launch],
                cwd=self._folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _wait(what: str, nodes: list[_Node], until: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not until():
        told = "\n".join(node.said()[-3000:] for node in nodes)
        assert time.monotonic() < deadline, f"{what}: {told}"
        time.sleep(0.2)


def test_a_node_that_is_cut_off_comes_back(nodes: list[str], tmp_path: Path) -> None:
    data = make_data(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", data, "run", steps=300)
    recipe.write_text(recipe.read_text().replace("timeout_minutes: 1.0", "timeout_minutes: 0.5"))
    running = [_Node(*place, tmp_path) for place in zip(nodes, ADDRESSES, strict=True)]
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        first = tmp_path / "run" / "checkpoints" / "step-00000010"
        _wait("a checkpoint", running, first.exists)
        _ip(f"-n {nodes[1]} link set cable down")
        told = "see that rank's last message"
        _wait("a message", running, lambda: any(told in node.said().lower() for node in running))
        message = next(n.said() for n in running if told in n.said().lower())
        assert "waited 30 seconds in vain (parallel.timeout_minutes)" in message
        steps = metrics.read_text().count("\n")
        _ip(f"-n {nodes[1]} link set cable up")

        def finished() -> bool:
            for node in running:
                # As Slurm starts a job again whose launcher has given up.
                if node.process.poll() not in (None, 0):
                    assert node.starts < 6, node.said()[-3000:]
                    node.start()
            return all(node.process.poll() == 0 for node in running)

        _wait("the end", running, finished)
    finally:
        for node in running:
            node.end()
    outcome = read_outcome(tmp_path / "outcome")
    assert outcome is not None
    assert outcome.ended == FINISHED
    assert 0 < steps < 300
    assert any("going on from run/checkpoints/step-" in node.said() for node in running)
    plain = [sys.executable, "-m", "ttt_megatron.cli.main", "train", "recipe.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*plain, "training.output=plain"], cwd=tmp_path, env=environment, check=True)
    found, wanted = (read_weights(resolve_checkpoint(tmp_path / run)) for run in ("run", "plain"))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name
