"""Training steps in parts of sequences and in pipeline stages, with replicas, and alone."""

from dataclasses import replace

import pytest
import step_traffic
from parallel_course import Course, Kind, under_layouts, worst
from ranks import launch

from ttt_megatron.config import ParallelConfig
from ttt_megatron.parallel.groups import processes

BOUND = 1e-10
CONTEXT = ParallelConfig(context=2, data=2)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TENSOR = ParallelConfig(context=2, tensor=2)
GQA = {"num_kv_heads": 2, "tie_embeddings": False, "prime_ffn_hidden_size": 8}

PIPELINE = ParallelConfig(pipeline=2)
TURNS = replace(PIPELINE, virtual_pipeline=2)
ZIGZAG = ParallelConfig(context=2, context_order="zigzag")
FOUR = {"micro": 1, "sequences": 4}
DEEP = {"num_layers": 6}

TWO = [
    Kind(parallel=PIPELINE, **FOUR),
    Kind(parallel=TURNS, model=DEEP, **FOUR),
    Kind(parallel=ZIGZAG, length=16, **FOUR),
]
MORE_OF_TWO = [
    Kind(parallel=PIPELINE, model=GQA, micro=2, sequences=4),
    # Fewer micro-batches than stages, and recomputed blocks.
    Kind(parallel=PIPELINE, recompute_prefix=True, inner={"memory_policy": "save_all"}),
    Kind(parallel=PIPELINE, inner={"mode": "off"}, **FOUR),
    Kind(parallel=TURNS, model=DEEP | GQA, inner={"two_level": True}, **FOUR),
    Kind(parallel=ZIGZAG, length=16, model=GQA, inner={"memory_policy": "save_all"}),
    Kind(parallel=ZIGZAG, length=16, inner={"mode": "off"}, **FOUR),
    Kind(parallel=ZIGZAG, length=16, inner={"mode": "first_order"}, **FOUR),
]
FOUR_RANKS = [
    Kind(parallel=CONTEXT, micro=1, length=16),
    # One chunk a part, so that the last part takes no step; and full attention.
    Kind(parallel=CONTEXT, micro=1, length=8, model={"window_size": None}),
    Kind(parallel=TENSOR, micro=1, length=16),
    Kind(parallel=replace(PIPELINE, tensor=2), **FOUR),
    Kind(parallel=replace(PIPELINE, context=2), length=16, **FOUR),
]
MORE_OF_FOUR = [
    Kind(parallel=replace(CONTEXT, **OVERLAP), micro=1, length=16),
    Kind(parallel=CONTEXT, micro=1, length=16, inner={"mode": "off"}),
    Kind(parallel=TENSOR, micro=1, length=16, inner={"two_level": True}),
    Kind(parallel=replace(TENSOR, sequence_parallel=True), length=16, model=GQA),
    # More parts than micro-batches, and a window that reaches over several of them.
    Kind(parallel=ParallelConfig(context=4), length=16, recompute_prefix=True),
    Kind(parallel=replace(PIPELINE, tensor=2, sequence_parallel=True), model=GQA, **FOUR),
    Kind(parallel=replace(PIPELINE, data=2, **OVERLAP), **FOUR),
    Kind(parallel=replace(TURNS, data=2, **OVERLAP), model=DEEP, micro=1, sequences=8),
    Kind(parallel=replace(TURNS, context=2), model=DEEP, length=16, **FOUR),
    Kind(parallel=ParallelConfig(pipeline=4), model=DEEP, **FOUR),
    Kind(parallel=replace(ZIGZAG, data=2, **OVERLAP), length=16, **FOUR),
    Kind(parallel=replace(ZIGZAG, tensor=2, sequence_parallel=True), length=16, **FOUR),
]


def _courses(
    kinds: list[Kind], counted: list[Kind]
) -> tuple[list[Course], list[list[step_traffic.Counted]]]:
    """Courses of some kinds, and what a step of others sends."""
    with processes("cpu") as device:
        found = [course for course, _ in under_layouts(device, kinds)]
        return found, step_traffic.count(device, counted)


@pytest.mark.parametrize(
    ("kinds", "counted", "processes"),
    [
        pytest.param(TWO, step_traffic.TWO, 2, id="two"),
        pytest.param(FOUR_RANKS, [], 4, id="four"),
        pytest.param(MORE_OF_TWO, [], 2, marks=pytest.mark.slow, id="more of two"),
        pytest.param(
            MORE_OF_FOUR, step_traffic.FOUR_RANKS, 4, marks=pytest.mark.slow, id="more of four"
        ),
    ],
)
def test_parts_train_what_one_process_does_and_send_what_formulas_say(
    kinds: list[Kind], counted: list[Kind], processes: int
) -> None:
    whole = [replace(kind, parallel=ParallelConfig(), micro=kind.sequences) for kind in kinds]
    alone, _ = _courses(whole, [])
    together, counts = launch(_courses, (kinds, counted), processes)
    for kind, one, course in zip(kinds, alone, together, strict=True):
        error, name = worst(course, one)
        assert error < BOUND, (kind, name, error)
    for kind, ranks in zip(counted, counts, strict=True):
        step_traffic.hold_to_formulas(kind, ranks)
