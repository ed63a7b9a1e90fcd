import numpy as np
import pytest
import torch

from ttt_megatron.data.dataset import TokenDataset
from ttt_megatron.data.validation import validation_sequences
from ttt_megatron.errors import UserError


def test_each_is_the_start_of_a_long_enough_document(train: TokenDataset) -> None:
    sequences = validation_sequences(train, 300, seed=1)
    eligible = np.flatnonzero(train.lengths >= 301)
    assert sorted(sequences.documents.tolist()) == eligible.tolist()
    for sequence in sequences:
        assert sequence.tokens.dtype == torch.int64
        assert sequence.name == train.names[sequence.document]
        np.testing.assert_array_equal(sequence.tokens, train.document(sequence.document)[:301])


def test_the_choice_is_fixed_and_grows(train: TokenDataset) -> None:
    few = validation_sequences(train, 100, 3, seed=1)
    more = validation_sequences(train, 100, 6, seed=1)
    assert len(few) == 3
    assert few.documents.tolist() == more.documents[:3].tolist() == more[:3].documents.tolist()
    other = validation_sequences(train, 100, 6, seed=2)
    assert other.documents.tolist() != more.documents.tolist()


def test_batches(train: TokenDataset) -> None:
    sequences = validation_sequences(train, 100, 5)
    batch = sequences.batch(3, 4)
    assert batch.tokens.shape == (2, 100)
    assert batch.rows.tolist() == [3, 4]
    assert batch.documents.tolist() == [[int(number), 0] for number in sequences.documents[3:]]
    torch.testing.assert_close(batch.tokens[1], sequences[4].tokens[:-1])
    torch.testing.assert_close(batch.targets[1], sequences[4].tokens[1:])
    assert batch.mask.all()


def test_whole_documents(train: TokenDataset) -> None:
    sequences = validation_sequences(train, None)
    assert len(sequences) == len(train)
    for sequence in sequences:
        np.testing.assert_array_equal(sequence.tokens, train.document(sequence.document))


def test_no_document_long_enough(train: TokenDataset) -> None:
    with pytest.raises(UserError, match="evaluate at a shorter length"):
        validation_sequences(train, int(train.lengths.max()))
