"""Tensor parallelism, with and without sequence parallelism, against one process."""

from dataclasses import replace

import pytest
from parallel_course import (
    BATCH,
    INNER,
    LENGTH,
    MODEL,
    Course,
    Kind,
    batch,
    traffic,
    train,
    worst,
)
from ranks import launch

from ttt_kernels import WeightGradients, putting_off
from ttt_megatron.config import ParallelConfig
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.parallel.replica import layer_slots
from ttt_megatron.parallel.traffic import Traffic
from ttt_megatron.training.weights import build_learner

BOUND = 1e-10
GQA = {"num_kv_heads": 2, "tie_embeddings": False, "prime_ffn_hidden_size": 8}
TENSOR = ParallelConfig(tensor=2)
SEQUENCE = replace(TENSOR, sequence_parallel=True)
ALL = {"memory_policy": "save_all"}
TWO_LEVEL = {"two_level": True, "memory_policy": "save_activations"}
OFF = {"mode": "off"}

TRAINED = [
    Kind(parallel=TENSOR),
    Kind(parallel=SEQUENCE, micro=1),
    Kind(parallel=TENSOR, model=GQA, inner=ALL),
    Kind(parallel=SEQUENCE, model=GQA, inner=ALL, recompute_prefix=True),
    Kind(parallel=SEQUENCE, inner=TWO_LEVEL),
    Kind(parallel=SEQUENCE, inner={"mode": "first_order", "clip": 0.0}),
    Kind(parallel=SEQUENCE, model={"num_suffix_layers": 0}, inner=OFF),
    Kind(parallel=SEQUENCE, model={"post_norm": False, "qk_norm": False}),
]
COUNTED = [
    Kind(parallel=parallel, inner=inner)
    for parallel in (TENSOR, SEQUENCE)
    for inner in ({}, ALL, {"two_level": True}, OFF)
]


def several(kinds: list[Kind]) -> list[Course]:
    """The courses of kinds whose layouts make the same process groups."""
    with process_groups("cpu", kinds[0].parallel) as groups:
        return [train(groups, kind) for kind in kinds]


def _own_gradients(kind: Kind, put_off: bool) -> Course:
    """This rank's gradients, those of slow weights formed in the backward pass or after it."""
    learner = build_learner(kind.config, layer_slots(kind.config.model, kind.parallel))
    own = batch(kind, 0)
    gradients = WeightGradients()
    with putting_off(gradients if put_off else None):
        learner(own.tokens, own.targets, own.mask).loss.backward()
    assert (gradients.pending > 0) == put_off
    gradients.form()
    found = {name: p.grad for name, p in learner.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


Found = tuple[list[Course], list[tuple[Traffic, Traffic]], list[tuple[float, str]]]


def _two_parts() -> Found:
    with process_groups("cpu", TENSOR) as groups:
        courses = [train(groups, kind) for kind in TRAINED]
        put_off = [
            worst(_own_gradients(kind, True), _own_gradients(kind, False)) for kind in TRAINED
        ]
        return courses, [traffic(kind) for kind in COUNTED], put_off


@pytest.fixture(scope="module")
def two_parts() -> Found:
    """All that is asked of two processes, started once."""
    return launch(_two_parts, (), 2)


def _compare(kinds: list[Kind], together: list[Course]) -> None:
    alone = several([replace(kind, parallel=ParallelConfig(), micro=BATCH) for kind in kinds])
    for kind, one, course in zip(kinds, alone, together, strict=True):
        error, name = worst(course, one)
        assert error < BOUND, (kind, name, error)


def test_two_parts_compute_what_one_process_does(two_parts) -> None:
    _compare(TRAINED, two_parts[0])


def test_gradients_formed_later_are_the_same(two_parts) -> None:
    for kind, (error, name) in zip(TRAINED, two_parts[2], strict=True):
        assert error < BOUND, (kind, name, error)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_parts_of_several_replicas_too(overlap: bool) -> None:
    layout = ParallelConfig(
        tensor=2, data=2, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    sequence = replace(layout, sequence_parallel=True)
    kinds = [Kind(parallel=layout, micro=1), Kind(parallel=sequence, model=GQA, micro=1)]
    _compare(kinds, launch(several, (kinds,), 4))


def _expected(kind: Kind) -> tuple[dict[str, int], dict[str, int]]:
    """docs/parallelism.md, "What is sent": elements in the forward and in the backward pass."""
    layers, suffix = MODEL["num_layers"], MODEL["num_suffix_layers"]
    chunks = LENGTH // INNER["chunk_size"]
    tokens = BATCH * LENGTH
    whole = tokens * MODEL["hidden_size"]
    chunk = whole // chunks
    sequence = kind.parallel.sequence_parallel
    if kind.inner == OFF:
        inside = 2 * layers + suffix
        entered = (inside + 1) * whole
        if sequence:
            return (
                {
                    "allreduce": whole + 4 * tokens,
                    "allgather": entered,
                    "reduce_scatter": inside * whole,
                },
                {"allgather": entered, "reduce_scatter": entered},
            )
        return {"allreduce": entered + 4 * tokens}, {"allreduce": entered}
    before, inside = 2 * (layers - suffix) + 1, 3 * suffix - 1
    steps, again = chunks - 1, 0
    if kind.inner.get("two_level"):
        again = steps - 1  # segments of one step, and only the last one's history was kept
    small = 4 * tokens + steps * BATCH + BATCH + 1
    small_back = steps * (6 * tokens // chunks + BATCH) + again * (4 * tokens // chunks + BATCH)
    scattered = before * whole + (2 * steps + 1) * inside * chunk
    scattered_back = before * whole + (steps * (4 * inside + 1) + inside + 1) * chunk
    scattered_back += again * 2 * inside * chunk
    if not sequence:
        return (
            {"allreduce": whole + scattered + small},
            {"allreduce": scattered_back + small_back},
        )
    gathered = (before + 1) * whole + (steps * (2 * inside + 1) + inside + 1) * chunk
    gathered_back = (before + 1) * whole + (steps * (4 * inside + 2) + inside + 1) * chunk
    gathered_back += again * (2 * inside + 1) * chunk
    return (
        {"allreduce": whole + small, "allgather": gathered, "reduce_scatter": scattered},
        {"allreduce": small_back, "allgather": gathered_back, "reduce_scatter": scattered_back},
    )


def test_what_is_sent_is_what_the_formula_says(two_parts) -> None:
    for kind, (forward, backward) in zip(COUNTED, two_parts[1], strict=True):
        expected = _expected(kind)
        assert dict(forward.elements) == expected[0], kind
        assert dict(backward.elements) == expected[1], kind
