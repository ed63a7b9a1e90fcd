"""Real processes that hang, are killed, and come back in other numbers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from small_run import losses, small_run

from ttt_megatron.config import RunConfig, to_yaml
from ttt_megatron.resilience.events import read_events
from ttt_megatron.training.checkpoint_folder import list_checkpoints
from ttt_megatron.training.weights import read_weights

pytestmark = pytest.mark.slow

STEPS = 60


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two processes. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    process = _train(_config(data, folder / "run"), folder)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    return folder / "run"


def _config(data: Path, output: Path, **changes: object) -> RunConfig:
    settings: dict[str, object] = {
        "training__steps": STEPS,
        "training__save_interval": 5,
        "training__precision": "fp64",
        "training__log_interval": 2,
        "parallel__data": 2,
    }
    return small_run(data, output, **(settings | changes))


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _train(config: RunConfig, folder: Path, *options: str) -> subprocess.Popen[str]:
    recipe = folder / "run.yaml"
    recipe.write_text(to_yaml(config))
    train = [sys.executable, "-m", "ttt_megatron.cli.main", "train", str(recipe)]
    return _start([*train, "--restart-wait", "0.1", *options])


def _until(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """A step has been done, of a run that is still going on."""
    deadline = time.monotonic() + 200
    while max(losses(output), default=0) < step if (output / "metrics.jsonl").exists() else True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _rank(launcher: psutil.Process, rank: int) -> psutil.Process:
    """One of the processes that a launcher started, in their order."""
    spawned = [p for p in launcher.children() if "spawn_main" in " ".join(p.cmdline())]
    return sorted(spawned, key=lambda p: p.pid)[rank]


def _launcher(process: subprocess.Popen[str]) -> psutil.Process:
    """Below the supervisor that the test started."""
    return psutil.Process(process.pid).children()[0]


def _same(output: Path, whole: Path) -> None:
    assert losses(output) == losses(whole)
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (output, whole)]
    one, other = map(read_weights, last)
    assert all(bool((one[name] == other[name]).all()) for name in other)


@pytest.mark.parametrize("whom", ["rank", "launcher"])
def test_a_killed_process_is_started_again(
    whom: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = _train(_config(data, output), tmp_path, "--max-restarts", "2")
    _until(process, output, 12)
    victim = _rank(_launcher(process), 1) if whom == "rank" else _launcher(process)
    victim.kill()
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert "starting again in 0.1 s from step 10, restart 1 of 2" in told
    _same(output, whole)
    kinds = [event.kind for event in read_events(output)]
    assert kinds[0] == "started"
    assert kinds.index("resumed") > kinds.index("restarting")
    assert kinds[-1] == "finished"
    assert "restarting" in kinds


def test_a_hung_collective_is_told_with_stacks_and_started_again(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    config = _config(data, output, faults__hang_minutes=0.2)
    process = _train(config, tmp_path, "--max-restarts", "1")
    _until(process, output, 12)
    _rank(_launcher(process), 1).suspend()
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "nothing finished for 12 s after step" in told
    assert "rank 1 wrote nothing and may be stopped or gone" in told
    [stacks] = (output / "stacks").iterdir()
    assert stacks.name.startswith("rank-0-")
    text = stacks.read_text()
    assert "nothing finished for 12 s" in text
    assert "distributed_c10d.py" in text
    assert [event.rank for event in read_events(output) if event.kind == "hung"] == [0]
    _same(output, whole)


@pytest.fixture
def limping() -> Iterator[Callable[[psutil.Process], None]]:
    """Holds a process up for two thirds of the time, until the test is over."""
    pids: list[int] = []
    helper = (
        "import os, signal, sys, time\n"
        "pid = int(sys.argv[1])\n"
        "while True:\n"
        "    os.kill(pid, signal.SIGSTOP); time.sleep(0.02)\n"
        "    os.kill(pid, signal.SIGCONT); time.sleep(0.01)\n"
    )
    helpers: list[subprocess.Popen[bytes]] = []

    def limp(process: psutil.Process) -> None:
        pids.append(process.pid)
        helpers.append(subprocess.Popen([sys.executable, "-c", helper, str(process.pid)]))

    yield limp
    for one in helpers:
        one.kill()
        one.wait()


def test_a_slow_rank_is_named(
    data: Path, tmp_path: Path, limping: Callable[[psutil.Process], None]
) -> None:
    output = tmp_path / "run"
    process = _train(_config(data, output, training__steps=100), tmp_path)
    _until(process, output, 5)
    limping(_rank(psutil.Process(process.pid), 1))
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    slow = [event.message for event in read_events(output) if event.kind == "slow"]
    assert any(line.startswith("rank 1 on ") for line in slow), slow


def _torchrun(config: RunConfig, folder: Path, port: int) -> subprocess.Popen[str]:
    """One of up to two nodes, with one rank."""
    recipe = folder / "run.yaml"
    recipe.write_text(to_yaml(config))
    return _start(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"),
            *("--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", "last_call_timeout=5"),
            *("-m", "ttt_megatron.cli.main", "train", str(recipe)),
        ]
    )


def _until_listening(port: int) -> None:
    deadline = time.monotonic() + 100
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_goes_on_with_fewer_nodes(data: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = _config(data, output, training__steps=STEPS, parallel__elastic=True)
    first = _torchrun(config, tmp_path, port)
    _until_listening(port)  # it holds the meeting, which would go with it
    second = _torchrun(config, tmp_path, port)
    try:
        _until(first, output, 12)
        second.send_signal(signal.SIGKILL)
        told, _ = first.communicate(timeout=300)
        assert first.returncode == 0, told
    finally:
        second.kill()
        second.communicate()
    assert "going on from" in told
    exact, got = losses(whole), losses(output)
    assert list(got) == list(exact)
    # One replica sums in another order than two: last digits differ, and no more.
    assert list(got.values()) == pytest.approx(list(exact.values()), rel=1e-9)
