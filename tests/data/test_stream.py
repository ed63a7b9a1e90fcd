import numpy as np
import pytest
import torch

from ttt_megatron.data.dataset import TokenDataset, open_dataset
from ttt_megatron.data.packing import Packing
from ttt_megatron.data.prepare import PrepareReport
from ttt_megatron.data.stream import Batch, TokenStream
from ttt_megatron.errors import UserError

PACKINGS: list[Packing] = ["concatenate", "spans"]


def assert_equal(left: Batch, right: Batch) -> None:
    for name in ("tokens", "targets", "mask", "rows", "documents"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=0, atol=0)


def joined(batches: list[Batch]) -> Batch:
    names = ("tokens", "targets", "mask", "rows", "documents")
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_is_inputs_targets_and_mask(train: TokenDataset, packing: Packing) -> None:
    batch = TokenStream(train, 64, packing, seed=1).next_batch(100)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == (100, 64)
    torch.testing.assert_close(batch.tokens[:, 1:], batch.targets[:, :-1])
    torch.testing.assert_close(batch.mask, batch.targets != train.bos_id)
    if packing == "spans":
        assert batch.mask.all()
    else:
        assert not batch.mask.all()
    for row in range(100):
        document, start = batch.documents[row].tolist()
        text = train.document(document)[start : start + 64]
        np.testing.assert_array_equal(batch.tokens[row, : len(text)], text)


def test_an_epoch_holds_every_token_but_the_tail(train: TokenDataset) -> None:
    stream = TokenStream(train, 50)
    epoch = stream.read_rows(0, stream.rows_per_epoch)
    seen = np.bincount(epoch.tokens.reshape(-1), minlength=train.vocab_size)
    everything = np.concatenate([train.document(number) for number in range(len(train))])
    missing = np.bincount(everything, minlength=train.vocab_size) - seen
    assert missing.min() >= 0
    assert missing.sum() == train.num_tokens - 50 * stream.rows_per_epoch <= 50


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_are_disjoint_equal_and_together_the_global_batch(
    train: TokenDataset, packing: Packing, world: int
) -> None:
    whole = TokenStream(train, 40, packing, seed=3)
    ranks = [TokenStream(train, 40, packing, seed=3) for _ in range(world)]
    # Far enough to pass the end of an epoch.
    for step in range(whole.rows_per_epoch // 12 + 2):
        parts = [stream.next_batch(12, rank, world) for rank, stream in enumerate(ranks)]
        assert {len(part) for part in parts} == {12 // world}
        assert_equal(joined(parts), whole.next_batch(12))
        assert joined(parts).rows.tolist() == list(range(12 * step, 12 * step + 12))
    assert whole.epoch > 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_resuming_at_another_size_reads_on_in_the_same_order(
    prepared: PrepareReport, train: TokenDataset, packing: Packing
) -> None:
    undisturbed = TokenStream(train, 32, packing, seed=5)
    expected = [undisturbed.next_batch(8) for _ in range(6)]
    stream = TokenStream(train, 32, packing, seed=5)
    for _ in range(2):
        stream.next_batch(8, rank=1, world=2)
    state = stream.state_dict()
    for world in (1, 4):
        resumed = [
            TokenStream(open_dataset(prepared.output), 32, packing, seed=5) for _ in range(world)
        ]
        for rank_stream in resumed:
            rank_stream.load_state_dict(state)
        for step in range(2, 6):
            parts = [rank.next_batch(8, r, world) for r, rank in enumerate(resumed)]
            assert_equal(joined(parts), expected[step])


def test_the_same_shards_serve_two_lengths(train: TokenDataset) -> None:
    short, long = TokenStream(train, 30), TokenStream(train, 120)
    every = short.read_rows(0, short.rows_per_epoch).tokens
    pieces = {tuple(piece.tolist()) for piece in every}
    for row in range(long.rows_per_epoch):
        sequence = long.read_rows(row, 1).tokens[0]
        assert all(tuple(piece.tolist()) in pieces for piece in sequence.view(4, 30))


def test_micro_batches_are_the_batch_in_order(train: TokenDataset) -> None:
    batch = TokenStream(train, 16).next_batch(10)
    parts = batch.split(4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert_equal(joined(parts), batch.to("cpu"))


def test_positions_of_other_data_or_settings_are_refused(train: TokenDataset) -> None:
    state = TokenStream(train, 32, "spans", 5).state_dict()
    for stream, key in [
        (TokenStream(train, 16, "spans", 5), "data.sequence_length=16 differs"),
        (TokenStream(train, 32, "concatenate", 5), "data.packing=concatenate differs"),
        (TokenStream(train, 32, "spans", 6), "data.seed=6 differs"),
    ]:
        with pytest.raises(UserError, match=key):
            stream.load_state_dict(state)
    with pytest.raises(UserError, match="is not the data of the saved position"):
        TokenStream(train, 32, "spans", 5).load_state_dict({**state, "fingerprint": "other"})


def test_too_little_text_and_uneven_ranks_are_refused(train: TokenDataset) -> None:
    with pytest.raises(UserError, match="prepare more text or choose a shorter sequence"):
        TokenStream(train, train.num_tokens)
    with pytest.raises(UserError, match=r"the longest document in .* has"):
        TokenStream(train, int(train.lengths.max()), "spans")
    assert TokenStream(train, train.num_tokens - 1).rows_per_epoch == 1
    with pytest.raises(UserError, match="must be at least 1"):
        TokenStream(train, 0)
    with pytest.raises(UserError, match="positive multiple of the 3 data-parallel"):
        TokenStream(train, 32).next_batch(8, 0, 3)
