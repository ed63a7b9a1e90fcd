"""Sequences in parts on several ranks must give what one process gives, gradients included."""

import pytest
from context_case import Case, run_in_parts, whole, worst_error
from ranks import launch

from ttt_megatron.errors import UserError
from ttt_megatron.parallel.context import part_length

BOTH = {
    "two suffix blocks": Case(),
    "full attention": Case(model={"window_size": None}, micro_batches=2),
    "plain model": Case(inner={"mode": "off"}, micro_batches=2),
    "recomputed prefix": Case(learner={"recompute_prefix": True}, micro_batches=2),
}
CASES = {
    2: BOTH
    | {
        "one suffix block": Case(model={"num_suffix_layers": 1}),
        "three suffix blocks, grouped queries": Case(
            model={"num_suffix_layers": 3, "num_kv_heads": 2}
        ),
        "no block before the suffix": Case(model={"num_layers": 2}),
        "window longer than a part": Case(model={"window_size": 25}),
        "window as long as a part": Case(model={"window_size": 17}),
        "window of two tokens": Case(model={"window_size": 2}),
        "first order": Case(inner={"mode": "first_order"}),
        "save_activations": Case(inner={"memory_policy": "save_activations"}),
        "save_all": Case(inner={"memory_policy": "save_all"}),
        "two levels": Case(inner={"two_level": True}, micro_batches=2),
        "two levels, save_all": Case(
            inner={"two_level": True, "segment_chunks": 3, "memory_policy": "save_all"}
        ),
        "one chunk a part": Case(inner={"chunk_size": 16}),
        "plain model, full attention": Case(
            model={"window_size": None, "num_suffix_layers": 0}, inner={"mode": "off"}
        ),
        "untied head": Case(model={"tie_embeddings": False}),
        "three micro-batches": Case(micro_batches=3),
        "five micro-batches": Case(micro_batches=5),
    },
    4: BOTH
    | {
        "window over two parts": Case(model={"window_size": 13}, micro_batches=2),
        "window over all parts": Case(model={"window_size": 27}, micro_batches=3),
        "three micro-batches": Case(micro_batches=3),
        "five micro-batches": Case(micro_batches=5),
        "two levels": Case(inner={"two_level": True, "segment_chunks": 1}, micro_batches=5),
        "one chunk a part": Case(inner={"chunk_size": 8}),
        "plain model, many micro-batches": Case(inner={"mode": "off"}, micro_batches=6),
    },
}


ZIGZAG = {
    2: {
        "one micro-batch": Case(),
        "two micro-batches": Case(micro_batches=2, split="none"),
        "five micro-batches": Case(micro_batches=5, split="both", debts=None),
        "window over parts": Case(model={"window_size": 21}, micro_batches=3, debts=3),
        "full attention": Case(model={"window_size": None}, micro_batches=3, split="none"),
        "plain model": Case(inner={"mode": "off"}, micro_batches=3, split="both"),
        "two levels, recomputed prefix": Case(
            inner={"two_level": True, "segment_chunks": 1},
            learner={"recompute_prefix": True},
            micro_batches=3,
            split="both",
        ),
        "untied head, grouped queries, save_activations": Case(
            model={"tie_embeddings": False, "num_kv_heads": 2, "num_suffix_layers": 3},
            inner={"memory_policy": "save_activations"},
            micro_batches=2,
            split="both",
        ),
        "first order": Case(inner={"mode": "first_order"}, micro_batches=2),
    },
    4: {
        "one micro-batch": Case(split="both"),
        "three micro-batches": Case(model={"window_size": 11}, micro_batches=3),
        "full attention": Case(model={"window_size": None}, micro_batches=2, split="none"),
        "nine micro-batches": Case(
            inner={"memory_policy": "save_all"}, micro_batches=9, split="both", debts=2
        ),
    },
}
ALL = {"plain": CASES, "zigzag": ZIGZAG}


@pytest.fixture(scope="module")
def found():
    """Results of all cases, one launch a number of ranks."""
    return {size: launch(run_in_parts, (CASES[size], ZIGZAG[size]), size) for size in CASES}


@pytest.mark.parametrize(
    ("order", "size", "name"),
    [(order, size, name) for order in ALL for size in ALL[order] for name in ALL[order][size]],
)
def test_parts_together_equal_the_whole(found, order, size, name):
    error, where = worst_error(found[size][order][name], whole(ALL[order][size][name]))
    assert error < 1e-10, where


def test_cases_are_second_order_indeed():
    """A first-order gradient misses by far: the tests above would see it."""
    error, _ = worst_error(whole(Case(inner={"mode": "first_order"})), whole(Case()))
    assert error > 0.1


def test_keys_of_other_parts_matter():
    """Without the halo these results differ: the tests above would see it."""
    error, _ = worst_error(whole(Case(model={"window_size": 1})), whole(Case()))
    assert error > 0.1


@pytest.mark.parametrize("length", [30, 36, 20])
def test_parts_must_be_whole_chunks(length):
    assert part_length(32, 4, 4) == 8
    with pytest.raises(UserError, match=rf"data\.sequence_length={length} .* inner\.chunk_size=4"):
        part_length(length, 4, 4)


def test_part_between_chunks_is_refused():
    from ttt_megatron.meta.part import Part

    class Shifted(Part):
        start = 6

    tokens, targets, mask = Case().data()[0]
    with pytest.raises(ValueError, match="between chunks of 4"):
        Case().build()(tokens, targets, mask, None, Shifted())
