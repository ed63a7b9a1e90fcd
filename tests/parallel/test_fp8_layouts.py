"""Float8 under every layout, against one process, in float64 beside the float8 products.

Scales are found from a process's own part of a tensor. They are powers of two, so that another
scale rounds the same, but for values too small for float8's normal numbers.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from parallel_course import BATCH, Course, Kind, courses, errors
from ranks import launch

from ttt_kernels import CurrentScaling
from ttt_megatron.config import ParallelConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.float8 import Float8Product, use_float8

BOUND = 1e-4
# Widths of which two processes have multiples of 16 each.
MODEL = {"hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 32, "init_std": 0.2}
INNER = {"lr": 0.5, "clip": 1.0}


def _product(layer: torch.nn.Module, rowwise: bool) -> Float8Product:
    return Float8Product(CurrentScaling(rowwise=rowwise))


@dataclass(frozen=True, kw_only=True)
class Float8Kind(Kind):
    """The tiny model with its static linear maps in float8."""

    rowwise: bool = False
    float8: bool = True

    def fill(self, learner: Learner) -> None:
        """Leaves the initial weights."""
        if self.float8:
            use_float8(learner.model, partial(_product, rowwise=self.rowwise))


LAYOUTS = {
    "tensor": ParallelConfig(tensor=2),
    "sequence": ParallelConfig(tensor=2, sequence_parallel=True),
    "data": ParallelConfig(data=2),
    "pipeline": ParallelConfig(pipeline=2),
    "context, gradients put off": ParallelConfig(context=2, context_order="zigzag"),
}


def _kinds() -> list[Float8Kind]:
    return [
        Float8Kind(
            parallel=parallel,
            model=MODEL,
            inner=INNER,
            micro=1,
            length=16,
            steps=1,
            rowwise=name == "sequence",
        )
        for name, parallel in LAYOUTS.items()
    ]


def _gradients(course: Course) -> Course:
    return {name: x for name, x in course.items() if name.startswith(("gradient/", "loss/"))}


def test_every_layout_computes_what_one_process_does() -> None:
    kinds = _kinds()
    alone = [replace(kind, parallel=ParallelConfig(), micro=BATCH) for kind in kinds[:2]]
    full = replace(alone[0], float8=False)
    found = [course for course, _ in launch(courses, (kinds,), 2)]
    by_tensor, by_row, float64 = (course for course, _ in courses([*alone, full]))
    for name, kind, course in zip(LAYOUTS, kinds, found, strict=True):
        expected = by_row if kind.rowwise else by_tensor
        error = max(errors(_gradients(course), _gradients(expected)).values())
        assert error < BOUND, (name, error)
    for course in (by_tensor, by_row):
        assert max(errors(_gradients(course), _gradients(float64)).values()) > 1000 * BOUND
