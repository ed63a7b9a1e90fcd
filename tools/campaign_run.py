"""A small training of four processes that can be watched, hurt and started again."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ttt_megatron.resilience.events import Event, read_events
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, list_checkpoints, read_info
from ttt_megatron.training.manifest import find_damage
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics
from ttt_megatron.training.weights import read_weights

STEPS = 40
SAVE_INTERVAL = 5
HANG_SECONDS = 15.0
_RANKS = 4
LAYOUTS = {
    "data 4": ("parallel.data=4",),
    "data 2, tensor 2": ("parallel.data=2", "parallel.tensor=2"),
    "data 2, context 2": ("parallel.data=2", "parallel.context=2"),
    "data 2, pipeline 2": ("parallel.data=2", "parallel.pipeline=2"),
}
RECIPE = f"""\
model: {{vocab_size: 260, num_layers: 4, num_suffix_layers: 2, hidden_size: 32, num_heads: 4,
  ffn_hidden_size: 64, window_size: 16}}
inner: {{chunk_size: 8, lr_start: 0.1, lr_warmup_fraction: 0.2}}
data: {{sequence_length: 32}}
optimizer: {{lr: 1e-2}}
training: {{steps: {STEPS}, global_batch_size: 4, micro_batch_size: 1, precision: fp64, device: cpu,
  save_interval: {SAVE_INTERVAL}, eval_sequences: 0, log_interval: 10}}
faults: {{hang_minutes: {HANG_SECONDS / 60}, drift_alarm: null}}
tracking: {{mlflow: false, progress: false}}
"""
_MARK = "FAULT_CAMPAIGN"
_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.002


class CampaignError(Exception):
    """A run did what it must not."""


@dataclass
class Run:
    """One training under `train --max-restarts`, and what is known of it from outside."""

    recipe: Path
    output: Path
    overrides: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    server: subprocess.Popen[bytes] | None = None
    starts: int = 0
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What all attempts printed."""
        return self.output.with_suffix(".log")

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.output / CHECKPOINTS

    def start(self) -> None:
        """The same command each time."""
        command = [sys.executable, "-m", "ttt_megatron.cli.main", "train", str(self.recipe)]
        command += [f"training.output={self.output}", *self.overrides]
        command += ["--max-restarts", "3", "--restart-wait", "0.2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, _MARK: self.mark}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self.starts += 1

    @property
    def supervisor(self) -> psutil.Process:
        """The process that was started, which starts the others."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def launcher(self) -> psutil.Process:
        """The parent of the ranks."""
        return self.supervisor.children()[0]

    def rank(self, rank: int) -> psutil.Process:
        """One of the launcher's processes, in their order, as soon as all are there."""
        self.wait_until(lambda: len(self._ranks()) == _RANKS, "all ranks to start")
        return self._ranks()[rank]

    def _ranks(self) -> list[psutil.Process]:
        with suppress(psutil.Error, IndexError):
            children = self.launcher().children()
            spawned = [p for p in children if "spawn_main" in " ".join(p.cmdline())]
            return sorted(spawned, key=lambda p: p.pid)
        return []

    def processes(self) -> list[psutil.Process]:
        """All that belong to the run, orphans too."""
        return [
            process
            for process in psutil.process_iter()
            if _variable(process, _MARK) == self.mark and not _is_over(process)
        ]

    @property
    def step(self) -> int:
        """The last step that is written down."""
        rows = read_metrics(self.output / METRICS_FILE)
        return int(rows[-1]["step"]) if rows else 0

    @property
    def saved(self) -> int:
        """The newest complete checkpoint's step, by hashes; 0 without one."""
        for checkpoint in reversed(list_checkpoints(self.checkpoints)):
            if find_damage(checkpoint) is None:
                return read_info(checkpoint).step
        return 0

    def events(self) -> list[Event]:
        """What the run wrote down of itself."""
        return read_events(self.output)

    def is_over(self) -> bool:
        """Whether the started process has ended."""
        assert self._process is not None
        return self._process.poll() is not None

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Returns when it holds; raises CampaignError if the run ends first, or time is up."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            if self.is_over():
                raise CampaignError(f"the run ended while waiting for {what}: see {self.log}")
            if time.monotonic() > deadline:
                raise CampaignError(f"waited {_PATIENCE_SECONDS:.0f} s for {what}: see {self.log}")
            time.sleep(_POLL_SECONDS)

    def wait(self) -> int:
        """Waits for the end; the exit status."""
        assert self._process is not None
        try:
            return self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise CampaignError(
                f"no end within {_PATIENCE_SECONDS:.0f} s: see {self.log}"
            ) from None

    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        rows = read_metrics(self.output / METRICS_FILE)
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def weights(self) -> dict[str, torch.Tensor]:
        """The last checkpoint's parameters."""
        return read_weights(list_checkpoints(self.checkpoints)[-1])

    def clear(self) -> None:
        """Ends what is left of it and removes its files."""
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.output, ignore_errors=True)


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def _is_over(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
