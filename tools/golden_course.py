"""A golden file as a case of `parallel_course`, and its arrays under that module's names."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from golden import Golden, build_learner, read_golden, to_ours
from parallel_course import Course
from torch import Tensor

from ttt_megatron.config import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner

_MODEL = "model."


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A file's model, weights and data, and the outer steps it holds, at least one.

    The step's inner learning rate is the file's, and the first step's batch the file's own.
    """

    path: Path
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro: int = 1

    @property
    def golden(self) -> Golden:
        """The file. Raises UserError if it is not a golden one."""
        return _read(self.path)

    @property
    def steps(self) -> int:
        """Outer steps: the file's, or one for the gradients."""
        return max(1, self._outer_steps)

    @property
    def _outer_steps(self) -> int:
        return int(self.golden.config.get("outer_steps", 0))

    @property
    def config(self) -> RunConfig:
        """The run that made the file, under this layout."""
        golden, learner = self.golden, _whole(self.path)
        count, length = golden.batch()[0].shape
        return RunConfig(
            model=learner.model.config,
            inner=replace(learner.inner, lr=golden.inner_lr),
            data=DataConfig(sequence_length=length),
            optimizer=OptimizerConfig(lr=4e-4, end_lr=1e-5, warmup_fraction=0.1),
            parallel=self.parallel,
            training=TrainingConfig(
                precision="fp64", steps=10, global_batch_size=count, micro_batch_size=self.micro
            ),
        )

    def whole_batch(self, step: int) -> Batch:
        """The file's own batch, then those of its further outer steps."""
        tokens, targets, mask = self.golden.batch(f"_{step}" if step else "")
        places = torch.zeros(len(tokens), 2, dtype=torch.int64)
        return Batch(tokens, targets, mask, torch.arange(len(tokens)), places)

    @torch.no_grad()
    def fill(self, learner: Learner) -> None:
        """Puts the file's weights into a rank's part of the model."""
        whole = _whole(self.path).model.state_dict()
        for name, parameter in learner.model.named_parameters():
            parameter.copy_(learner.model.slots.take_part(name, whole[name]))

    def expected(self) -> Course:
        """What the file holds of a course."""
        golden = self.golden
        expected = {
            "nll": golden.tensor("token_nll"),
            "chunk losses": golden.tensor("chunk_loss"),
            "loss/0": golden.tensor("loss"),
            "logged/0/first_chunk_loss": golden.tensor("chunk_loss")[:, 0].mean(),
            "logged/0/last_chunk_loss": golden.tensor("chunk_loss")[:, -1].mean(),
        }
        expected |= self._parameters("g/", "gradient")
        if golden.is_meta:
            norms = golden.tensor("inner_gnorm")
            # In training no step follows the last chunk.
            expected["logged/0/inner_grad_norm"] = norms[:, :-1].mean()
            expected |= self._fast()
        for step in range(self._outer_steps):
            expected[f"loss/{step}"] = golden.tensor(f"outer/loss_{step}")
            logged = golden.tensor(f"outer/gnorm_logged_{step}")
            expected[f"logged/{step}/grad_norm"] = (logged**2 - 1e-5).sqrt()
        return expected | self._parameters("outer/w/", "parameter")

    def _parameters(self, stored: str, title: str) -> Course:
        golden, start = self.golden, len(stored)
        arrays = {k[start:]: golden.tensor(k) for k in golden.arrays if k.startswith(stored)}
        ours = to_ours(arrays, _whole(self.path)) if arrays else {}
        return {f"{title}/{_MODEL}{name}": value for name, value in ours.items()}

    def _fast(self) -> Course:
        """Fast weights of every sequence after the last chunk's step."""
        gate, down, up = (self.golden.tensor(f"fast/w{part}") for part in (1, 2, 3))
        found: dict[str, Tensor] = {}
        names = _whole(self.path).fast_parameter_names
        for row in range(len(gate)):
            for slot, (fc1, fc2) in enumerate(zip(names[::2], names[1::2], strict=True)):
                wide = torch.cat((gate[row, slot].mT, up[row, slot].mT))
                found |= {f"fast/{row}/{fc1}": wide, f"fast/{row}/{fc2}": down[row, slot].mT}
        return found


@lru_cache
def _read(path: Path) -> Golden:
    return read_golden(path)


@lru_cache
def _whole(path: Path) -> Learner:
    return build_learner(_read(path), torch.float64)
