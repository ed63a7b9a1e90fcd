import itertools
import shutil
from pathlib import Path

import pytest
import torch

from ttt_megatron.data.dataset import TokenDataset, open_dataset
from ttt_megatron.data.prefetch import Prefetcher
from ttt_megatron.data.prepare import PrepareReport
from ttt_megatron.data.stream import TokenStream
from ttt_megatron.errors import UserError


def test_the_same_batches_and_position_as_without(train: TokenDataset) -> None:
    plain, ahead = TokenStream(train, 32, seed=2), TokenStream(train, 32, seed=2)
    plain.rows = ahead.rows = 24
    with Prefetcher(ahead, 8, rank=1, world=2) as batches:
        for _ in range(50):
            expected = plain.next_batch(8, 1, 2)
            torch.testing.assert_close(next(batches).tokens, expected.tokens, rtol=0, atol=0)
            assert ahead.state_dict() == plain.state_dict()
    assert not batches._thread.is_alive()


def test_a_reading_error_is_raised_at_its_batch(prepared: PrepareReport, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared.output, tmp_path / "data")
    stream = TokenStream(open_dataset(folder), 32)
    (folder / "train-00000.tar").write_bytes(b"")
    with Prefetcher(stream, 8) as batches:
        with pytest.raises(UserError, match=r"train-00000\.tar is truncated"):
            list(itertools.islice(batches, stream.rows_per_epoch))
        assert stream.rows < stream.rows_per_epoch
