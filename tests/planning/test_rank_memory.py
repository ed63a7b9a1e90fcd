"""The planned memory of every rank against live tensors counted in real training steps."""

import pytest
from measure_parallel_memory import measure, measure_here, planned
from small_training import small_data, small_run

from ttt_megatron.planning.layout import Layout
from ttt_megatron.planning.rank_memory import rank_memory

SHORT = ("data.sequence_length=256", "training.global_batch_size=2")


@pytest.fixture(scope="module")
def folder():
    with small_data() as made:
        yield made


def compare(measured, expected):
    assert len(measured) == len(expected)
    for kinds, own in zip(measured, expected, strict=True):
        assert sum(own.values()) == pytest.approx(sum(kinds.values()), rel=0.15)
        for name in ("weights", "gradients", "optimizer", "prefix activations"):
            assert own[name] == pytest.approx(kinds[name], rel=0.15), name
        # One copy of the fast weights, of the keys and values: what the moment decides.
        kept = kinds.get("fast-weight history", 0)
        assert kept <= own["fast-weight history"] <= kept + 3 * 128 * 256 * 2 * 4


def test_one_process_holds_what_is_planned(folder):
    config = small_run(folder, SHORT)
    compare(measure_here(config), planned(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.sequence_parallel=true"),
        ("parallel.context=2",),
        ("parallel.data=2",),
        ("parallel.pipeline=2",),
    ],
    ids=lambda layout: layout[-1],
)
def test_every_rank_holds_what_is_planned(folder, layout):
    config = small_run(folder, ("data.sequence_length=1024", *layout))
    compare(measure(config), planned(config))


def test_ranks_of_a_sequence_share_what_grows_with_it(folder):
    config = small_run(folder, ("training.global_batch_size=1", "model.window_size=64"))
    [whole] = rank_memory(config, Layout())
    for ranks in (2, 4):
        found = rank_memory(config, Layout(context=ranks))
        assert len(found) == ranks
        for rank, kinds in enumerate(found):
            for name in ("prefix activations", "prefix output"):
                assert kinds[name] == whole[name] / ranks
            # 31 inner steps in 32 chunks: the last rank takes one less than the others.
            steps = 32 // ranks - (rank == ranks - 1)
            assert kinds["fast-weight history"] == whole["fast-weight history"] * steps / 31
            received = kinds["keys and values"] - whole["keys and values"] / ranks
            assert received == (0 if rank == 0 else 63 * 128 * 4 * 4)
