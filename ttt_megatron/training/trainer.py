"""The outer loop: batches in, updates out, callbacks told, checkpoints written."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import ttt_kernels
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.prefetch import Prefetcher
from ttt_megatron.data.stream import Batch, TokenStream
from ttt_megatron.errors import UserError
from ttt_megatron.resilience.events import Event, Kind
from ttt_megatron.tracing import span
from ttt_megatron.training.callbacks.base import Callback
from ttt_megatron.training.checkpoint import RunParts, load_checkpoint
from ttt_megatron.training.checkpoint_folder import CheckpointInfo
from ttt_megatron.training.engine import Update
from ttt_megatron.training.float8 import Float8Scales
from ttt_megatron.training.flops import model_flops_per_token
from ttt_megatron.training.memory import memory_in_use
from ttt_megatron.training.precision import parameter_dtype_of
from ttt_megatron.training.records import StepRecord
from ttt_megatron.training.saver import SaveError, Saver
from ttt_megatron.training.schedule import inner_learning_rate, learning_rate
from ttt_megatron.training.spikes import LossWindow
from ttt_megatron.training.step import reduce_measurements

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps besides tensors and the data position.

    `losses` are the last steps', with which the next one is compared.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    last_loss: float = math.nan
    spikes: int = 0
    rewinds: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass
class Trainer:
    """Runs outer steps from `progress.step` to `config.training.steps`.

    Every rank holds one and calls `fit`, which is collective. `stop_signal` may be set at any time
    (by a signal handler): the step under way is finished, saved, and `fit` returns.
    """

    config: RunConfig
    parts: RunParts
    stream: TokenStream
    norm: str
    """Whose RMSNorm the prefix uses, and why."""
    recurrences: Mapping[str, str] = field(default_factory=dict)
    """The same of the recurrences of mixers that have one."""
    float8: Float8Scales | None = None
    callbacks: Sequence[Callback] = ()
    progress: Progress = field(default_factory=Progress)
    tracking_run: str | None = None
    lineage: Sequence[Sequence[str]] = ()
    stop_signal: int | None = None
    stopped: bool = False
    checkpoint: Path | None = None
    seconds_stopped: float = 0.0
    """How long the newest checkpoint kept training from going on."""
    _saver: Saver = field(init=False)
    _failed_saves: int = 0
    _save_step: int = 0
    """Of the newest save that was begun."""

    def __post_init__(self) -> None:
        self._saver = Saver(self.parts, self.config)

    def fit(self) -> None:
        """Trains to the last step, or until asked to stop.

        Raises UserError where `config.faults` bounds what can be gone on with: steps that had to
        be skipped, rewinds, checkpoints that could not be written.
        """
        training, groups = self.config.training, self.parts.groups
        share = (groups.data_rank, groups.data_size)
        if groups.is_main:
            logger.info("%s", "; ".join(f"{k}: {v}" for k, v in self.implementations.items()))
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            with Prefetcher(self.stream, training.global_batch_size, *share) as batches:
                while not (self.finished or self.stopped):
                    start = time.perf_counter()
                    batch = next(batches)
                    self._advance(batch, time.perf_counter() - start)
            for callback in self.callbacks:
                callback.on_end(self)
        finally:
            self._saver.close()
            for callback in self.callbacks:
                callback.close(self)

    def _advance(self, batch: Batch, data_seconds: float) -> None:
        record, writing, spike = self._step(batch, data_seconds)
        if self._saver.under_way and not writing:
            self._complete_save()
        for callback in self.callbacks:
            callback.on_step(self, record)
        if spike and self.config.faults.spikes == "rewind" and self.checkpoint is not None:
            self._rewind()
            return
        training, step = self.config.training, self.progress.step
        if step % training.save_interval == 0 or self.finished or self.stopped:
            self.save()
        if self.progress.skipped_in_a_row >= self.config.faults.max_skipped:
            if self._saver.under_way:
                self._complete_save()
            raise UserError(self._diverged())

    def _step(self, batch: Batch, data_seconds: float) -> tuple[StepRecord, bool, bool]:
        """One outer step; counts it in `progress`.

        Also whether any rank writes a checkpoint, and whether the loss was a spike.
        """
        start = time.perf_counter()
        config, step = self.config, self.progress.step
        total = config.training.steps
        inner_lr = inner_learning_rate(config.inner, step, total)
        micro_batches = batch.to(self.parts.groups.device).split(config.training.micro_batch_size)
        engine = self.parts.engine
        engine.zero_grad()
        if self.float8 is not None:
            self.float8.begin_step()
        measured = engine.forward_backward(micro_batches, inner_lr)
        if self.float8 is not None:
            self.float8.end_passes()
        measurements, (self.stopped, writing) = reduce_measurements(
            measured, [self.stop_signal is not None, self._saver.writing], self.parts.groups
        )
        spike = self._notice_spike(measurements.loss)
        if math.isfinite(measurements.loss) and not (spike and config.faults.spikes != "ignore"):
            with span("optimizer"):
                update = engine.step(step)
        else:
            rate = learning_rate(config.optimizer, step, total)
            update = Update(grad_norm=math.nan, learning_rate=rate, applied=False)
        self._count(measurements.loss, update, spike)
        tokens = config.training.global_batch_size * config.data.sequence_length
        record = StepRecord(
            step=self.progress.step,
            measurements=measurements,
            update=update,
            inner_lr=inner_lr,
            seconds=time.perf_counter() - start,
            passes_seconds=engine.passes_seconds,
            data_seconds=data_seconds,
            memory=memory_in_use(),
            tokens=tokens,
            model_flops=tokens * model_flops_per_token(config.model, config.data.sequence_length),
        )
        return record, writing, spike

    def _notice_spike(self, loss: float) -> bool:
        """Whether the loss of the step under way stands out; takes it in either way."""
        faults, progress = self.config.faults, self.progress
        window = LossWindow(faults.spike_window, faults.spike_sigma, progress.losses)
        spike = window.is_spike(loss)
        window.add(loss)
        progress.spikes += spike
        return spike

    def _count(self, loss: float, update: Update, spike: bool) -> None:
        progress = self.progress
        progress.step += 1
        # A finite loss under a gradient that is not makes no finite state either.
        progress.last_loss = loss if update.applied or spike else math.nan
        progress.skipped += not update.applied
        progress.skipped_in_a_row = 0 if update.applied else progress.skipped_in_a_row + 1
        if spike:
            follows = "the update is made" if update.applied else "no update is made"
            self.tell("spike", f"loss {loss:.4f} stands out of the steps before: {follows}")
        elif not update.applied:
            self.tell("skipped", f"loss {loss}, gradient norm {update.grad_norm}: no update")

    def tell(self, kind: Kind, message: str) -> None:
        """Lets people know of something, on every rank or on one."""
        event = Event(kind=kind, message=message, step=self.progress.step)
        if self.parts.groups.is_main:
            logger.warning("step %d  %s: %s", self.progress.step, kind, message)
        for callback in self.callbacks:
            callback.on_event(self, event)

    def alive(self) -> None:
        """Tells that what takes longer than a step goes well."""
        for callback in self.callbacks:
            callback.on_alive(self)

    def _rewind(self) -> None:
        """Back to the newest checkpoint; the data goes on behind the spike. Collective."""
        if self._saver.under_way:
            self._complete_save()
        before, checkpoint = self.progress, self.checkpoint
        assert checkpoint is not None
        if before.rewinds >= self.config.faults.max_rewinds:
            raise UserError(
                f"the loss of step {before.step} is a spike again, after {before.rewinds} rewinds "
                f"(faults.max_rewinds): lower optimizer.lr or inner.lr and start from "
                f"{checkpoint} with training.init_from, or set faults.spikes=skip"
            )
        # The data's position stays.
        self._restore_learning(load_checkpoint(self.parts, checkpoint))
        self.progress.skipped, self.progress.spikes = before.skipped, before.spikes
        self.progress.rewinds = before.rewinds + 1
        for callback in self.callbacks:
            callback.on_rewind(self)
        self.tell("rewound", f"from step {before.step} to {checkpoint}, on with later data")

    @property
    def implementations(self) -> dict[str, str]:
        """Whose kernels, RMSNorm and AdamW this run computes with, and why."""
        dtype = parameter_dtype_of(self.config.training.precision)
        kernels = ttt_kernels.backend(self.parts.groups.device, dtype)
        return {
            "kernels": str(kernels),
            "prefix RMSNorm": self.norm,
            "AdamW": self.parts.engine.adam,
            **self.recurrences,
        }

    @property
    def finished(self) -> bool:
        """Whether the last step is done, and not merely the last one for now."""
        return self.progress.step >= self.config.training.steps

    def report(self, metrics: dict[str, float]) -> None:
        """Hands an evaluation's results, equal on all ranks, to the callbacks."""
        for callback in self.callbacks:
            callback.on_evaluation(self, self.progress.step, metrics)

    def save(self) -> None:
        """Writes a checkpoint of the state after `progress.step` steps. Collective.

        With training.async_save it has its name only some steps later, unless this step is the
        last. One that cannot be written is told, and training goes on: see faults.save_attempts.

        Raises UserError if there is to be none any more, or parameters are not finite.
        """
        if self._saver.under_way:
            self._complete_save()
        self._require_finite()
        start, self.seconds_stopped = time.perf_counter(), 0.0
        progress = self.progress
        self._save_step = progress.step
        info = CheckpointInfo(
            path="",
            step=progress.step,
            loss=progress.last_loss,
            finite=math.isfinite(progress.last_loss),
            data_fingerprint=self.stream.dataset.fingerprint,
            tracking_run=self.tracking_run,
            lineage=self.lineage,
        )
        state = {"progress": asdict(progress), "stream": self.stream.state_dict()}
        if self.float8 is not None:
            state["float8"] = self.float8.state_dict()
        try:
            self._saver.start(info, state)
        except SaveError as error:
            self._bear(error)
            return
        self.seconds_stopped = time.perf_counter() - start
        if not self.config.training.async_save or self.finished or self.stopped:
            self._complete_save()

    def _complete_save(self) -> None:
        """Waits for the checkpoint that is being written. Collective."""
        start = time.perf_counter()
        try:
            self.checkpoint = self._saver.complete()
        except SaveError as error:
            self._bear(error)
            return
        self._failed_saves = 0
        self.seconds_stopped += time.perf_counter() - start
        for callback in self.callbacks:
            callback.on_checkpoint(self, self.checkpoint)

    def restore(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Takes up where `save` left; `state` is what `load_checkpoint` returned."""
        self._restore_learning(state)
        self.stream.load_state_dict(state["stream"])
        self.checkpoint = checkpoint

    def _restore_learning(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        if self.float8 is not None:
            self.float8.load_state_dict(state["float8"])

    def _bear(self, error: SaveError) -> None:
        """Goes on without the checkpoint, unless it was the last or one too many."""
        self._failed_saves += 1
        ends = self.finished or self.stopped
        # At the end one more is still tried behind an earlier one.
        last = ends and self._save_step == self.progress.step
        many = not ends and self._failed_saves >= self.config.faults.save_attempts
        if last or many:
            raise error
        self.tell("save failed", f"{error}. Training goes on")

    def _require_finite(self) -> None:
        """Raises UserError, on all ranks, if any holds a parameter that is not finite. Collective.

        Whatever went wrong, it is not to take the place of the last sound checkpoint.
        """
        self.parts.engine.settle()
        parameters = self.parts.named_parameters()
        sound = torch.stack([value.detach().isfinite().all() for value in parameters.values()])
        own = [name for name, fine in zip(parameters, sound.tolist(), strict=True) if not fine]
        for rank, names in enumerate(self.parts.groups.gather_objects(own[:1])):
            if names:
                raise UserError(
                    f"after step {self.progress.step}, rank {rank}'s {names[0]} is not finite: no "
                    f"checkpoint was written; start from {self.checkpoint or 'the beginning'} "
                    f"with training.init_from and a lower optimizer.lr or inner.lr"
                )

    def _diverged(self) -> str:
        return (
            f"the last {self.progress.skipped_in_a_row} steps, up to step {self.progress.step}, "
            f"had a loss or gradient that is not finite, or a spike, and were skipped "
            f"(faults.max_skipped). The last finite checkpoint is kept "
            f"in {self.config.training.output}: lower optimizer.lr or inner.lr, choose another "
            f"training.output, and start from that checkpoint with training.init_from"
        )
