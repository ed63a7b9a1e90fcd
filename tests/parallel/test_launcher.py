"""What the parent tells when its workers fail."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from ttt_megatron.errors import PassingError, UserError
from ttt_megatron.parallel import launcher
from ttt_megatron.parallel.launcher import WorkerError, launch


def _fail(how: str) -> None:
    """Rank 1 fails; rank 0 is left waiting for it, and fails in turn."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        if how == "user":
            raise UserError("data.path is empty")
        if how == "crash":
            raise ValueError("not for users")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_the_first_failure_is_told_once_with_its_rank() -> None:
    with pytest.raises(UserError, match=r"^rank 1: data\.path is empty$"):
        launch(_fail, ("user",), 2)


def test_a_crash_is_told_with_its_traceback() -> None:
    with pytest.raises(WorkerError, match=r"rank 1 failed:\n(?s:.*)ValueError: not for users$"):
        launch(_fail, ("crash",), 2)


def test_a_killed_worker_is_told_by_its_signal() -> None:
    with pytest.raises(WorkerError, match="SIGKILL"):
        launch(_fail, ("kill",), 2)


def test_a_signal_before_there_is_a_worker_ends_the_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_worker_yet(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launcher, "_run_agent", no_worker_yet)
    with pytest.raises(SystemExit, match="143"):
        launch(_fail, ("user",), 1)


def _be_asked_to_end_early() -> None:
    """The parent passes it on to this worker, which does not listen yet."""
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def test_a_signal_before_the_workers_listen_is_no_crash() -> None:
    with pytest.raises(SystemExit, match="143"):
        launch(_be_asked_to_end_early, (), 1)


def test_under_torchrun_the_world_must_be_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 processes, but .* makes 2"):
        launch(_fail, ("user",), 2)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_gpu_that_is_missing_may_be_there_on_other_nodes(
    elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun it is worth another attempt; by hand it is a mistake."""
    from ttt_megatron.parallel.groups import choose_device

    kind = PassingError if elsewhere else UserError
    if elsewhere:
        monkeypatch.setenv("RANK", "7")
        monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device") as told:
        choose_device("cuda")
    assert told.type is kind
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="the job has 8 GPUs on this node, and torch") as told:
        choose_device("auto")
    assert told.type is kind
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    with pytest.raises(
        UserError, match="local rank 7 has no GPU of its own: torch finds 7"
    ) as told:
        choose_device("auto", 7)
    assert told.type is kind


def test_one_process_is_a_group_of_one() -> None:
    # Here, not above: the workers that fail need not wait for mcore's import.
    from ttt_megatron.parallel.groups import process_groups

    with process_groups("cpu") as groups:
        assert (groups.rank, groups.world_size, groups.data_size) == (0, 1, 1)
        assert dist.get_backend() == "gloo"
        assert groups.gather_objects("x") == ["x"]
    assert not dist.is_initialized()
