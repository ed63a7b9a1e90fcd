"""Checkpoints written beside the training: the same as others, complete or not there."""

import errno
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from small_run import losses, small_run

from ttt_megatron.config import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.resilience.events import read_events
from ttt_megatron.training import background_write
from ttt_megatron.training.callbacks import Callback
from ttt_megatron.training.checkpoint_folder import list_checkpoints
from ttt_megatron.training.records import StepRecord
from ttt_megatron.training.run import build_trainer, run_training
from ttt_megatron.training.trainer import Trainer

# Less than a rank's tensors, more than anything else that a run of 2 ranks writes.
NO_ROOM_BYTES = 24_000


class _Watch(Callback):
    """Steps done: when each checkpoint had its name, and now."""

    def __init__(self) -> None:
        self.saved: dict[str, int] = {}
        self.step = 0
        self.over = False

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.step, self.over = record.step, trainer.finished

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        assert path == trainer.checkpoint
        assert path.is_dir()
        self.saved[path.name] = trainer.progress.step


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> _Watch:
    """A file takes a step's time, so that training overtakes a save that shares its memory."""
    watch, write = _Watch(), background_write._write_bucket

    def slow(*arguments: Any, **options: Any) -> None:
        begun, deadline = watch.step, time.monotonic() + 60
        while watch.step <= begun and not watch.over and time.monotonic() < deadline:
            time.sleep(0.002)
        write(*arguments, **options)

    monkeypatch.setattr(background_write, "_write_bucket", slow)
    return watch


def _train(config: RunConfig, *callbacks: Callback) -> None:
    Path(config.training.output).mkdir()
    with process_groups("cpu") as groups:
        trainer = build_trainer(config, groups)
        trainer.callbacks = [*trainer.callbacks, *callbacks]
        trainer.fit()


def _content(checkpoint: Path) -> dict[str, Any]:
    """Every tensor and plain value, parameters and moments by name."""
    from megatron.core import dist_checkpointing

    state = checkpoint / "state"
    with process_groups("cpu"):
        stored = dist_checkpointing.load_plain_tensors(str(state))
    trainer = dist_checkpointing.load_common_state_dict(str(state))["trainer"]
    return {name: value for name, value in stored.items() if "." in name} | {"trainer": trainer}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def test_a_save_beside_the_training_holds_the_state_of_its_step(
    data: Path, tmp_path: Path, slow_disk: _Watch
) -> None:
    steps = {"training__save_interval": 2, "training__keep_last": 9}
    _train(small_run(data, tmp_path / "aside", training__async_save=True, **steps), slow_disk)
    assert list(slow_disk.saved) == ["step-00000002", "step-00000004", "step-00000006"]
    assert slow_disk.saved["step-00000002"] > 2
    assert slow_disk.saved["step-00000006"] == 6
    slow_disk.over, at_once = True, _Watch()
    _train(small_run(data, tmp_path / "at once", **steps), at_once)
    assert list(at_once.saved.values()) == [2, 4, 6]
    assert losses(tmp_path / "aside") == losses(tmp_path / "at once")
    folders = [list_checkpoints(tmp_path / name / "checkpoints") for name in ("aside", "at once")]
    for one, other in zip(*folders, strict=True):
        content = _content(one)
        assert len(content) > 20
        assert _same(content, _content(other)), one.name
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


@contextmanager
def _no_room() -> Iterator[None]:
    """Files of this process may not grow further; the error is that of the file system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NO_ROOM_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _run_out_of_room(config: RunConfig) -> list[str]:
    """What both ranks are told when rank 1 cannot write its share."""
    with process_groups("cpu", config.parallel) as groups:
        trainer = build_trainer(config, groups)
        told = "nothing"
        try:
            if groups.rank == 1:
                with _no_room():
                    trainer.fit()
            else:
                trainer.fit()
        except UserError as error:
            told = str(error)
        return [str(told) for told in groups.gather_objects((told, trainer.progress.step))]


def test_a_rank_that_cannot_write_stops_all_at_the_next_step(data: Path, tmp_path: Path) -> None:
    config = small_run(
        data,
        tmp_path / "run",
        training__steps=100_000,
        training__save_interval=2,
        training__async_save=True,
        model__ffn_hidden_size=256,
        parallel__data=2,
        faults__save_attempts=1,
    )
    Path(config.training.output).mkdir()
    first, second = launch(_run_out_of_room, (config,), 2)
    assert first == second
    assert "step-00000002 could not be written (rank 1: [Errno 27] File too large" in first
    assert "the same command then goes on from the checkpoint before" in first
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("end", ["signal", "last step"])
def test_an_earlier_save_that_fails_takes_not_the_last_one_along(
    end: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, write = _Watch(), background_write._write_bucket

    class End(Callback):
        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            if end == "signal" and record.step == 3:
                trainer.stop_signal = signal.SIGTERM

    def first_fails(transforms: Any, index: int, bucket: Any, *more: Any, **options: Any) -> None:
        if "step-00000002" in str(bucket[0]):
            deadline = time.monotonic() + 60
            while watch.step < 4 and time.monotonic() < deadline:  # the last step
                time.sleep(0.002)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(transforms, index, bucket, *more, **options)

    monkeypatch.setattr(background_write, "_write_bucket", first_fails)
    config = small_run(
        data,
        tmp_path / "run",
        training__async_save=True,
        training__save_interval=2,
        training__steps=4 if end == "last step" else 6,
        faults__save_attempts=1,
    )
    _train(config, watch, End())
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000004"]
    kinds = [event.kind for event in read_events(tmp_path / "run")]
    assert "save failed" in kinds


def test_a_folder_that_cannot_be_made_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=r"could not be written \(rank 0: .*checkpoints"):
        run_training(small_run(data, tmp_path / "run", training__steps=1))


def test_a_run_that_fails_leaves_no_thread_and_no_checkpoint(
    data: Path, tmp_path: Path, slow_disk: _Watch
) -> None:
    class Fail(Callback):
        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            if record.step == 2:
                slow_disk.over = True
                raise ValueError("in a callback")

    config = small_run(data, tmp_path / "run", training__save_interval=1, training__async_save=True)
    with pytest.raises(ValueError, match="in a callback"):
        _train(config, Fail())
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())
    checkpoints = tmp_path / "run" / "checkpoints"
    assert ["step-00000001.tmp-" in path.name for path in checkpoints.iterdir()] == [True]
    run_training(config)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    assert ["tmp" in path.name for path in checkpoints.iterdir()] == [False, False]
