"""A run on one rank, from its resolved configuration to its result."""

import errno
import fcntl
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.stream import TokenStream
from ttt_megatron.errors import PassingError, UserError
from ttt_megatron.meta.chunk_graph import ChunkPrograms
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups, process_groups
from ttt_megatron.parallel.meeting import Meeting
from ttt_megatron.parallel.pipeline import own_stages
from ttt_megatron.parallel.replica import layer_slots
from ttt_megatron.resilience.events import EVENTS_FILE, Event, record_event, recording_failure
from ttt_megatron.tracing import start_trace, stop_trace
from ttt_megatron.tracking.journal import JOURNAL_FILE
from ttt_megatron.tracking.state import TRACKING_FILE
from ttt_megatron.tracking.store import tracking_uri
from ttt_megatron.training.agreement import own_facts, require_agreement
from ttt_megatron.training.callbacks import build_callbacks
from ttt_megatron.training.callbacks.watchdog import STACKS
from ttt_megatron.training.checkpoint import RunParts, load_checkpoint
from ttt_megatron.training.checkpoint_folder import (
    CHECKPOINTS,
    read_config,
    set_damaged_aside,
    sweep,
)
from ttt_megatron.training.engines import build_engine
from ttt_megatron.training.float8 import float8_scales
from ttt_megatron.training.fused_norm import choose_norm
from ttt_megatron.training.initial_weights import start_from
from ttt_megatron.training.metrics_file import METRICS_FILE
from ttt_megatron.training.precision import compute_dtype
from ttt_megatron.training.preflight import find_resumable
from ttt_megatron.training.recurrences import use_recurrences
from ttt_megatron.training.result import TrainingResult
from ttt_megatron.training.resume import refuse_changes
from ttt_megatron.training.trainer import Trainer
from ttt_megatron.training.weights import build_learner

logger = logging.getLogger(__name__)

_LOCK_FILE = ".lock"
TRACE_FOLDER = "trace"
_BELONGS_TO_A_RUN = (
    CHECKPOINTS,
    METRICS_FILE,
    TRACKING_FILE,
    JOURNAL_FILE,
    "dashboard.html",
    TRACE_FOLDER,
    EVENTS_FILE,
    STACKS,
    "*.png",
)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the time: the progress bar, while it shows, puts lines above."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


def train_worker(config: RunConfig, fresh: bool) -> TrainingResult:
    """`run_training` in a process of its own: our messages go to stderr, the main rank's alone."""
    ours = logging.getLogger("ttt_megatron")
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logging.basicConfig(format="%(message)s", handlers=[_StderrHandler()])
    with recording_failure(Path(config.training.output)):
        return run_training(config, fresh)


def run_training(config: RunConfig, fresh: bool = False) -> TrainingResult:
    """Trains as one rank of a run whose configuration `resolve_run` has resolved. Collective.

    Goes on from the newest complete checkpoint of the output folder; with `fresh`, what lies there
    is put aside and the run starts over.

    Raises UserError if another process trains in the folder, if the ranks disagree, or as the parts
    it is made of do; LostRankError if another rank is gone or does not answer.
    """

    def agree(meeting: Meeting, device: torch.device) -> None:
        require_agreement(meeting, own_facts(config, device))

    with process_groups(config.training.device, config.parallel, agree) as groups:
        output = Path(config.training.output)
        with _locked(output) if groups.is_main else nullcontext():
            trainer = build_trainer(config, groups, fresh)
            with _traced(output / TRACE_FOLDER, groups) if config.training.trace else nullcontext():
                trainer.fit()
        return _result(trainer)


@contextmanager
def _traced(folder: Path, groups: Groups) -> Iterator[None]:
    """Record what happens within and write it, also when it ends in an error."""
    trace = start_trace(groups.rank)
    try:
        yield
    finally:
        stop_trace()
        folder.mkdir(parents=True, exist_ok=True)
        trace.write(folder / f"rank-{groups.rank}.json")


def build_trainer(config: RunConfig, groups: Groups, fresh: bool = False) -> Trainer:
    """Everything a run consists of, standing where its newest checkpoint left it. Collective."""
    training, output = config.training, Path(config.training.output)
    checkpoint = _find_start(output, fresh) if groups.is_main else None
    checkpoint = groups.broadcast_object(checkpoint)
    if checkpoint is not None:
        refuse_changes(read_config(checkpoint), config, str(checkpoint))
    _seed(training.seed)
    learners = build_learners(config, groups)
    norm = choose_norm(training.fused_norm, groups.device, compute_dtype(config))
    for learner in learners:
        norm.install(learner.model)
        if training.cuda_graphs:
            learner.runner = ChunkPrograms()
    dtype = compute_dtype(config)
    recurrences = use_recurrences(training.mixer_kernels, learners, groups, dtype)
    if checkpoint is None and training.init_from is not None:
        start_from(learners, training.init_from, groups)
    data = config.data
    stream = TokenStream(open_dataset(data.path), data.sequence_length, data.packing, data.seed)
    trainer = Trainer(
        config=config,
        parts=RunParts(engine=build_engine(learners, config, groups), groups=groups),
        stream=stream,
        float8=float8_scales(learners, config),
        norm=str(norm),
        recurrences=recurrences,
        callbacks=build_callbacks(config, groups),
    )
    if checkpoint is not None:
        trainer.restore(load_checkpoint(trainer.parts, checkpoint), checkpoint)
        if groups.is_main:
            logger.info("going on from %s (step %d)", checkpoint, trainer.progress.step)
    return trainer


def build_learners(config: RunConfig, groups: Groups) -> list[Learner]:
    """This rank's parts of the model, freshly initialised on the CPU, in the order it takes them.

    The model's vocabulary size must be known.
    """
    slots = layer_slots(config.model, config.parallel)
    return [build_learner(config, slots, stage) for stage in own_stages(config, groups)]


def _find_start(output: Path, fresh: bool) -> Path | None:
    """The checkpoint to go on from, after tidying the folder; on the main rank."""
    if fresh:
        _put_aside(output)
    folder = output / CHECKPOINTS
    sweep(folder)
    checkpoint = find_resumable(output)
    if checkpoint is not None:
        for aside in set_damaged_aside(folder, checkpoint):
            message = f"a later checkpoint is damaged, and is now {aside}: remove it when you like"
            logger.warning("%s", message)
            record_event(output, Event(kind="damaged", message=message))
    return checkpoint


def _put_aside(output: Path) -> None:
    """Moves the folder's run into `previous-N` inside it, so that --fresh destroys nothing."""
    found = [path for pattern in _BELONGS_TO_A_RUN for path in sorted(output.glob(pattern))]
    if found:
        number = 1
        while (aside := output / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        logger.info("the run that was in %s is now in %s", output, aside)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One training at a time in a folder. The lock goes with the process, however it ends.

    Raises PassingError if another process holds it, UserError if the file system has no locks.
    """
    output.mkdir(parents=True, exist_ok=True)
    # A POSIX lock: checkpoint writers forked from this process do not inherit it.
    with (output / _LOCK_FILE).open("ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{output} cannot be locked ({error.strerror}), and two trainings in it would "
                    f"spoil each other: mount that file system with locks (Lustre: -o flock; NFS: "
                    f"without nolock, with its lock service), or choose another training.output"
                ) from None
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "(unknown)"
            raise PassingError(
                f"process {holder} is training in {output}: wait for it, or choose another "
                f"training.output"
            ) from None
        with suppress(OSError):  # a full disk: only a message lacks the number then
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _result(trainer: Trainer) -> TrainingResult:
    config = trainer.config
    output = Path(config.training.output)
    tracked = config.tracking.mlflow
    return TrainingResult(
        step=trainer.progress.step,
        steps=config.training.steps,
        last_loss=trainer.progress.last_loss,
        checkpoint=str(trainer.checkpoint) if trainer.checkpoint else None,
        tracking_store=tracking_uri(config.tracking, output) if tracked else None,
        tracking_run=trainer.tracking_run,
        # Perhaps another rank's, which this one was only told of.
        stop_signal=None if trainer.finished else trainer.stop_signal or signal.SIGTERM,
    )
