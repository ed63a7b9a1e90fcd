"""What befalls the numbers, disks and clocks of a run, and what the run makes of it."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import losses, small_run

from ttt_megatron.config import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.resilience.events import read_events
from ttt_megatron.training.callbacks import Callback
from ttt_megatron.training.callbacks.metrics_log import MetricsLog
from ttt_megatron.training.callbacks.slow_ranks import SlowRanks, Times
from ttt_megatron.training.checkpoint_folder import list_checkpoints
from ttt_megatron.training.metrics_file import read_metrics
from ttt_megatron.training.records import StepRecord
from ttt_megatron.training.run import build_trainer
from ttt_megatron.training.spikes import LossWindow
from ttt_megatron.training.trainer import Trainer
from ttt_megatron.training.weights import read_weights

Doing = Callable[[Trainer, StepRecord], None]


class _Do(Callback):
    """Does something after each step, the first time it comes there."""

    def __init__(self, at: int, what: Doing) -> None:
        self._at = at
        self._what = what
        self.weights: dict[int, torch.Tensor] = {}

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.weights[record.step] = _gains(trainer).detach().clone()
        if record.step == self._at:
            self._at = -1
            self._what(trainer, record)


def _gains(trainer: Trainer) -> torch.nn.Parameter:
    return trainer.parts.named_parameters()["model.final_norm.weight"]


def _magnify(trainer: Trainer, record: StepRecord) -> None:
    """What a bit flipped in memory can do."""
    with torch.no_grad():
        _gains(trainer).mul_(1000)


def _train(config: RunConfig, *callbacks: Callback, rows: int | None = None) -> Trainer:
    Path(config.training.output).mkdir(parents=True, exist_ok=True)
    with process_groups("cpu") as groups:
        trainer = build_trainer(config, groups)
        if rows is not None:
            trainer.stream.rows = rows
        trainer.callbacks = [*trainer.callbacks, *callbacks]
        trainer.fit()
    return trainer


def _kinds(config: RunConfig) -> list[tuple[str, int | None]]:
    return [(event.kind, event.step) for event in read_events(Path(config.training.output))]


def _spiky(data: Path, output: Path, action: str, **changes: object) -> RunConfig:
    return small_run(
        data,
        output,
        training__steps=12,
        training__save_interval=4,
        faults__spikes=action,
        faults__spike_window=4,
        faults__spike_sigma=4.0,
        faults__drift_alarm=None,
        **changes,
    )


def test_a_spike_stands_out_of_a_full_window_alone() -> None:
    window = LossWindow(4, 6.0)
    for loss in (3.0, 3.1, 2.9):
        window.add(loss)
    assert not window.is_spike(100.0)
    window.add(float("inf"))
    assert not window.is_spike(100.0)
    window.add(3.0)
    # Mean 3, deviation 0.0707: the bound is at 3.424.
    assert not window.is_spike(3.42)
    assert window.is_spike(3.43)
    assert not window.is_spike(-100.0)
    assert not window.is_spike(float("nan"))
    for _ in range(4):
        window.add(5.0)
    assert window.losses == [5.0] * 4


def test_a_skipped_spike_changes_no_parameter(data: Path, tmp_path: Path) -> None:
    config = _spiky(data, tmp_path / "run", "skip")
    watch = _Do(6, _magnify)
    trainer = _train(config, watch)
    assert torch.equal(watch.weights[7], 1000 * watch.weights[6])
    assert not torch.equal(watch.weights[6], watch.weights[5])
    # The level stays where it is, so that the steps after it are trained on.
    assert not torch.equal(watch.weights[8], watch.weights[7])
    assert _kinds(config) == [("started", 0), ("spike", 7), ("finished", 12)]
    assert (trainer.progress.spikes, trainer.progress.skipped) == (1, 1)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["skipped"]] == [7]

    ends = _spiky(data, tmp_path / "ends", "skip", faults__max_skipped=1)
    with pytest.raises(UserError, match=r"last 1 steps, up to step 7.*faults\.max_skipped"):
        _train(ends, _Do(6, _magnify))
    ignored = _spiky(data, tmp_path / "ignored", "ignore", faults__max_skipped=1)
    assert _train(ignored, _Do(6, _magnify)).progress.spikes == 1


def test_a_rewound_run_equals_one_that_never_saw_the_data(data: Path, tmp_path: Path) -> None:
    config = _spiky(data, tmp_path / "rewound", "rewind")
    trainer = _train(config, _Do(6, _magnify))
    assert _kinds(config) == [("started", 0), ("spike", 7), ("rewound", 4), ("finished", 12)]
    assert (trainer.progress.step, trainer.progress.rewinds, trainer.progress.spikes) == (12, 1, 1)
    # Steps 5 to 7 and their data are as if they had not been: 8 steps more, from row 28 on.
    other = replace(config, training=replace(config.training, output=str(tmp_path / "other")))
    first = _train(other, _Do(3, _stop))
    assert first.progress.step == 4
    _train(other, rows=28)
    for name, value in _last_weights(config).items():
        assert torch.equal(value, _last_weights(other)[name]), name
    assert list(losses(tmp_path / "rewound")) == list(range(1, 13))
    assert losses(tmp_path / "rewound")[5] == losses(tmp_path / "other")[5]


def _stop(trainer: Trainer, record: StepRecord) -> None:
    """Noticed in the step after this one."""
    trainer.stop_signal = 15


def _last_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return read_weights(list_checkpoints(Path(config.training.output) / "checkpoints")[-1])


def test_rewinds_have_an_end(data: Path, tmp_path: Path) -> None:
    config = _spiky(data, tmp_path / "run", "rewind", faults__max_rewinds=1)
    with pytest.raises(UserError, match=r"step 9 is a spike again, after 1 rewinds"):
        _train(config, _Do(6, _magnify), _Do(8, _magnify))


def test_parameters_that_are_not_finite_take_no_checkpoints_place(
    data: Path, tmp_path: Path
) -> None:
    def spoil(trainer: Trainer, record: StepRecord) -> None:
        with torch.no_grad():
            _gains(trainer)[3] = torch.nan

    config = small_run(data, tmp_path / "run")
    with pytest.raises(UserError, match=r"after step 6, rank 0's model\.final_norm\.weight is not"):
        _train(config, _Do(5, spoil))
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000003"]
    assert all(value.isfinite().all() for value in _last_weights(config).values())


def _room(
    data: Path, output: Path, at: int, until: int, **changes: object
) -> tuple[str, RunConfig]:
    """A run whose files may not grow from step `at` on until `until`; what it ends with."""
    config = small_run(data, output, model__ffn_hidden_size=256, **changes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift(trainer: Trainer, record: StepRecord) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def fill(trainer: Trainer, record: StepRecord) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        _train(config, _Do(at, fill), _Do(until, lift))
    except UserError as error:
        return str(error), config
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "", config


def test_a_full_disk_costs_checkpoints_and_no_figures(data: Path, tmp_path: Path) -> None:
    told, config = _room(data, tmp_path / "run", 2, 5)
    assert told == ""
    assert _kinds(config) == [("started", 0), ("save failed", 3), ("finished", 6)]
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step-00000006"]


def test_a_run_goes_on_though_the_disk_is_full_at_its_start(data: Path, tmp_path: Path) -> None:
    config = small_run(data, tmp_path / "run")
    _train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    exact, limits = losses(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift(trainer: Trainer, record: StepRecord) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        _train(config, _Do(5, lift))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 2000
    assert losses(tmp_path / "run") == exact
    assert list(exact) == [1, 2, 3, 4, 5, 6]


def test_figures_that_wait_are_cut_at_a_rewind_and_written_at_the_end(tmp_path: Path) -> None:
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(tmp_path)

    def at(step: int) -> Any:
        return SimpleNamespace(progress=SimpleNamespace(step=step))

    def figures(*steps: int) -> None:
        for step in steps:
            log.on_evaluation(at(step), step, {"loss": float(step)})

    log.on_start(at(0))
    figures(1)
    try:
        # Room for half a line more.
        room = path.stat().st_size * 3 // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        figures(2, 3, 4)
        assert path.stat().st_size == room
        log.on_rewind(at(3))
        figures(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close(at(4))
    assert list(losses(tmp_path).items()) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert len(path.read_text().splitlines()) == 4


def test_a_disk_that_stays_full_ends_the_run_with_what_was_saved(
    data: Path, tmp_path: Path
) -> None:
    told, _ = _room(
        data,
        tmp_path / "run",
        3,
        100,
        training__steps=40,
        training__save_interval=2,
        faults__save_attempts=2,
    )
    assert "step-00000006 could not be written" in told
    assert "goes on from the checkpoint before" in told
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step-00000002"]


def test_runaway_fast_weights_are_told_once(data: Path, tmp_path: Path) -> None:
    config = small_run(data, tmp_path / "run", faults__drift_alarm=1e-6)
    _train(config)
    [event] = [e for e in read_events(tmp_path / "run") if e.kind == "drift"]
    assert event.step == 1
    assert "faults.drift_alarm=1e-06" in event.message


def _times(**slow: float) -> Times:
    return Times(**{"host": "n7", "passes": 1.0, "data": 0.0, "probe": 0.01} | slow)


def test_a_rank_is_named_when_it_stays_slow() -> None:
    watch = SlowRanks(10, 1.5)
    usual = [_times()] * 3
    assert watch.look([*usual, _times(passes=2.0)]) == []
    assert watch.look([*usual, _times(passes=2.0)]) == []
    [line] = watch.look([*usual, _times(passes=2.0)])
    assert line.startswith("rank 3 on n7 takes 2000 ms for its passes before")
    assert "the median rank 1000 ms" in line
    assert watch.look([*usual, _times(passes=2.0)]) == []
    # Recovered, and slow at something else; a wait of microseconds beside none is no slowness.
    for _ in range(2):
        assert watch.look([_times(probe=0.02), *usual]) == []
    assert watch.look([_times(data=0.0005), *usual]) == []
    for _ in range(2):
        assert watch.look([_times(probe=0.02), *usual]) == []
    [line] = watch.look([_times(probe=0.02), *usual])
    assert line.startswith("rank 0 on n7 takes 20 ms for a fixed piece of arithmetic")
