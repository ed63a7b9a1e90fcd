"""Training steps under context parallelism, with replicas and tensor parallelism, and alone."""

from dataclasses import replace
from itertools import groupby

import pytest
from parallel_course import BATCH, Course, Kind, train, worst

from ttt_megatron.config import ParallelConfig
from ttt_megatron.parallel.groups import layout, processes
from ttt_megatron.parallel.launcher import launch

BOUND = 1e-10
CONTEXT = ParallelConfig(context=2, data=2)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TENSOR = ParallelConfig(context=2, tensor=2)
GQA = {"num_kv_heads": 2, "tie_embeddings": False, "prime_ffn_hidden_size": 8}

KINDS = [
    Kind(parallel=CONTEXT, micro=1, length=16),
    # One chunk a part, so that the last part takes no step; and full attention.
    Kind(parallel=CONTEXT, micro=1, length=8, model={"window_size": None}),
    Kind(parallel=TENSOR, micro=1, length=16),
]
MORE = [
    Kind(parallel=replace(CONTEXT, **OVERLAP), micro=1, length=16),
    Kind(parallel=CONTEXT, micro=1, length=16, inner={"mode": "off"}),
    Kind(parallel=TENSOR, micro=1, length=16, inner={"two_level": True}),
    Kind(parallel=replace(TENSOR, sequence_parallel=True), length=16, model=GQA),
    # More parts than micro-batches, and a window that reaches over several of them.
    Kind(parallel=ParallelConfig(context=4), length=16, recompute_prefix=True),
]


def _layout(kind: Kind) -> tuple[int, int, int]:
    return kind.parallel.data, kind.parallel.context, kind.parallel.tensor


def _courses(kinds: list[Kind]) -> list[Course]:
    found: list[Course] = []
    with processes("cpu") as device:
        for _, alike in groupby(kinds, key=_layout):
            of_layout = list(alike)
            with layout(device, of_layout[0].parallel) as groups:
                found += [train(groups, kind) for kind in of_layout]
    return found


@pytest.mark.parametrize(
    "kinds", [KINDS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["plain", "more"]
)
def test_parts_train_what_one_process_does(kinds: list[Kind]) -> None:
    alone = _courses([replace(kind, parallel=ParallelConfig(), micro=BATCH) for kind in kinds])
    together = launch(_courses, (kinds,), 4)
    for kind, one, course in zip(kinds, alone, together, strict=True):
        error, name = worst(course, one)
        assert error < BOUND, (kind, name, error)
