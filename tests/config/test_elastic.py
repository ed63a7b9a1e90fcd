"""A run on the processes that there are."""

import pytest

from ttt_megatron.config import from_dict
from ttt_megatron.config.elastic import fit_to_world
from ttt_megatron.errors import UserError


def _config(**parallel: int):
    return from_dict(
        {
            "parallel": {"data": 4, "elastic": True, **parallel},
            "training": {"global_batch_size": 24, "micro_batch_size": 6},
        }
    )


@pytest.mark.parametrize(
    ("world", "replicas", "micro"), [(4, 4, 6), (8, 8, 3), (6, 6, 2), (2, 2, 6), (24, 24, 1)]
)
def test_the_batch_stays_and_is_shared_anew(world, replicas, micro):
    fitted = fit_to_world(_config(), world)
    assert (fitted.parallel.data, fitted.training.micro_batch_size) == (replicas, micro)
    assert fitted.training.global_batch_size == 24


def test_a_replica_keeps_its_shape():
    fitted = fit_to_world(_config(tensor=2), 4)
    assert (fitted.parallel.tensor, fitted.parallel.data) == (2, 2)
    with pytest.raises(UserError, match=r"started 5 processes, and a replica .* takes 2"):
        fit_to_world(_config(tensor=2), 5)


def test_a_number_that_does_not_divide_the_batch_is_told():
    with pytest.raises(UserError, match=r"5 replicas, which cannot share .*size=24 evenly"):
        fit_to_world(_config(), 5)
