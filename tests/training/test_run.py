"""Whole runs of one process, without a launcher."""

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import losses, small_run

from ttt_megatron.config import RunConfig, from_dict, to_dict
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.validation import validation_sequences
from ttt_megatron.errors import PassingError, UserError
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.resilience.events import read_events
from ttt_megatron.training.callbacks import Callback
from ttt_megatron.training.checkpoint_folder import list_checkpoints, read_info
from ttt_megatron.training.preflight import check_start, resolve_run
from ttt_megatron.training.records import StepRecord
from ttt_megatron.training.run import build_trainer, run_training
from ttt_megatron.training.trainer import Trainer
from ttt_megatron.training.weights import load_learner, read_weights


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run to its end. Read only."""
    config = small_run(data, tmp_path_factory.mktemp("finished") / "run")
    run_training(config)
    return config


def _output(config: RunConfig) -> Path:
    return Path(config.training.output)


def test_a_run_learns_saves_and_can_be_repeated_bitwise(
    finished: RunConfig, data: Path, tmp_path: Path
) -> None:
    curve = losses(_output(finished))
    assert list(curve) == [1, 2, 3, 4, 5, 6]
    assert curve[6] < curve[1] - 0.3
    saved = list_checkpoints(_output(finished) / "checkpoints")
    assert [read_info(path).step for path in saved] == [3, 6]
    assert read_info(saved[-1]).loss == curve[6]
    assert (_output(finished) / "loss.png").stat().st_size > 1000
    again = small_run(data, tmp_path / "again")
    run_training(again)
    assert losses(tmp_path / "again") == curve


class _StopAt(Callback):
    """A signal during a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self._step:
            signal.raise_signal(signal.SIGTERM)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    finished: RunConfig, data: Path, tmp_path: Path
) -> None:
    config = small_run(data, tmp_path / "run")
    _output(config).mkdir()
    with process_groups("cpu") as groups:
        trainer = build_trainer(config, groups, fresh=False)
        trainer.callbacks = [*trainer.callbacks, _StopAt(3)]
        trainer.fit()
    assert trainer.progress.step == 4
    assert not trainer.finished
    result = run_training(config)
    assert (result.step, result.stop_signal) == (6, None)
    assert losses(tmp_path / "run") == losses(_output(finished))


def test_load_learner_needs_no_group_and_gives_the_trained_model(finished: RunConfig) -> None:
    learner, config, info = load_learner(_output(finished))
    assert config == finished
    assert info.step == 6
    stored = read_weights(Path(info.path))
    assert stored.keys() == dict(learner.named_parameters()).keys()
    for name, parameter in learner.named_parameters():
        assert torch.equal(parameter, stored[name])
    assert not torch.equal(
        stored["model.final_norm.weight"], torch.ones_like(stored["model.final_norm.weight"])
    )
    assert (Path(info.path) / "tokenizer" / "tokenizer.meta.json").is_file()


def test_bfloat16_and_first_order_runs_stay_near(finished: RunConfig, tmp_path: Path) -> None:
    config = replace(
        finished,
        training=replace(finished.training, precision="bf16", output=str(tmp_path / "bf16")),
    )
    run_training(config)
    exact = losses(_output(finished))
    for step, loss in losses(tmp_path / "bf16").items():
        assert loss == pytest.approx(exact[step], rel=0.02)
        assert loss != exact[step] or step == 1
    weights = read_weights(list_checkpoints(tmp_path / "bf16" / "checkpoints")[-1])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_changed_settings_are_refused_by_name_and_harmless_ones_are_not(
    finished: RunConfig,
) -> None:
    def changed(**sections: dict[str, object]) -> RunConfig:
        values = to_dict(finished)
        for section, settings in sections.items():
            values[section] |= settings
        return from_dict(values)

    check_start(changed(training={"save_interval": 1, "micro_batch_size": 2}), fresh=False)
    with pytest.raises(UserError, match=r"training\.steps is 9 and was 6") as caught:
        check_start(changed(training={"steps": 9}, optimizer={"lr": 0.5}), fresh=False)
    assert "optimizer.lr is 0.5 and was 0.01" in str(caught.value)
    with pytest.raises(UserError, match=r"model\.hidden_size"):
        check_start(changed(model={"hidden_size": 32}), fresh=False)


def test_fresh_puts_the_old_run_aside(finished: RunConfig, data: Path, tmp_path: Path) -> None:
    config = small_run(data, tmp_path / "run", training__steps=2)
    run_training(config)
    run_training(config, fresh=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "run" / "previous-1")


def test_a_damaged_checkpoint_is_set_aside_and_told(
    finished: RunConfig, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    shutil.copytree(_output(finished), output)
    checkpoints = output / "checkpoints"
    (checkpoints / "step-00000006" / "info.json").write_text("{")
    run_training(small_run(data, output, training__keep_last=1))
    aside = checkpoints / "damaged-step-00000006"
    assert (aside / "info.json").read_text() == "{"
    assert [read_info(path).step for path in list_checkpoints(checkpoints)] == [6]
    assert losses(output) == losses(_output(finished))
    [event] = [event for event in read_events(output) if event.kind == "damaged"]
    assert str(aside) in event.message
    assert event.message in caplog.text


def test_diverging_runs_stop_and_keep_the_last_finite_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    config = small_run(
        data,
        tmp_path / "run",
        training__steps=40,
        training__save_interval=2,
        training__keep_last=2,
        optimizer__lr=1e30,
        optimizer__warmup_fraction=0.1,
    )
    with pytest.raises(UserError, match=r"last 10 steps.*training\.init_from"):
        run_training(config)
    infos = [read_info(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert [info.finite for info in infos] == [True, False, False]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["skipped"] for row in rows) == 10


def test_one_training_at_a_time_in_a_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX);"
            "f.write('77'); f.flush(); print('held', flush=True); time.sleep(60)",
            str(tmp_path / "run" / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="process 77 is training in"):
            run_training(small_run(data, tmp_path / "run"))
    finally:
        holder.kill()
        holder.wait()


def test_a_file_system_without_locks_is_told_as_that(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(UserError, match=r"run cannot be locked \(No locks available\)") as raised:
        run_training(small_run(data, tmp_path / "run"))
    assert not isinstance(raised.value, PassingError)


def test_the_vocabulary_is_the_datas_unless_said_otherwise(data: Path, tmp_path: Path) -> None:
    resolved = resolve_run(small_run(data, tmp_path, model__vocab_size=None))
    assert resolved.model.vocab_size == 257
    assert resolve_run(small_run(data, tmp_path, model__vocab_size=300)).model.vocab_size == 300
    with pytest.raises(UserError, match=r"model\.vocab_size=256 is less than the 257"):
        resolve_run(small_run(data, tmp_path, model__vocab_size=256))


def test_validation_loss_is_the_mean_over_sequences(data: Path, tmp_path: Path) -> None:
    config = small_run(
        data,
        tmp_path / "run",
        training__steps=2,
        training__eval_interval=1,
        training__eval_sequences=3,
        training__micro_batch_size=2,
    )
    run_training(config)
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(evaluated) == [1, 2]
    learner, _, _ = load_learner(tmp_path / "run")
    held_out = validation_sequences(open_dataset(data, "validation"), 32, 3)
    batch = held_out.batch(0, 3)
    with torch.no_grad():
        loss = learner(batch.tokens, batch.targets, batch.mask, config.inner.lr).loss.item()
    assert math.isclose(evaluated[2], loss, rel_tol=1e-6)
