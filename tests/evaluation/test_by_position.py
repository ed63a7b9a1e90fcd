"""Per-token losses, against each document read alone."""

import pytest
import torch
from tiny_learner import tiny_learner

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.by_position import evaluate_by_position

BOS = 0


@pytest.fixture(scope="module")
def learner():
    return tiny_learner(window=8)


def draw_documents(lengths):
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 19, (n,), generator=generator) for n in lengths]
    for document in documents:
        document[0] = BOS
    return documents


def alone(learner, document, inner_steps):
    inputs, targets = document[None, :-1], document[None, 1:]
    with torch.no_grad():
        output = learner(inputs, targets, targets != BOS, inner_steps=inner_steps)
    return output.token_nll[0]


@pytest.mark.parametrize("inner_steps", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batches_of_unequal_documents_equal_each_alone(learner, inner_steps, batch):
    documents = draw_documents([30, 5, 17, 2, 22, 9, 22, 31])
    seen = []
    losses = evaluate_by_position(
        learner,
        iter(documents),
        inner_steps=inner_steps,
        batch=batch,
        bos_id=BOS,
        on_progress=lambda *done: seen.append(done),
    )
    for document, nll, counted in zip(documents, losses.nll, losses.counted, strict=True):
        expected = alone(learner, document, inner_steps).numpy()
        assert nll == pytest.approx(expected, rel=1e-11, abs=1e-12)
        assert counted.all()
    assert losses.longest == 30
    assert [sum(column) for column in zip(*seen, strict=True)] == [8, 130]


def test_inner_steps_make_a_difference_and_only_after_the_first_chunk(learner):
    documents = draw_documents([25])
    on, off = (evaluate_by_position(learner, documents, inner_steps=x) for x in (True, False))
    changed = abs(on.nll[0] - off.nll[0]) > 1e-6
    assert not changed[:4].any()
    assert changed[4:].all()


def test_length_cuts_and_bos_is_not_counted(learner):
    (document,) = draw_documents([25])
    document[10] = BOS
    losses = evaluate_by_position(learner, [document], 12, bos_id=BOS)
    assert losses.nll[0] == pytest.approx(alone(learner, document[:13], True).numpy())
    assert (~losses.counted[0]).nonzero()[0].tolist() == [9]


def test_documents_that_cannot_be_measured_are_refused(learner):
    with pytest.raises(UserError, match="document 1 has the shape"):
        evaluate_by_position(learner, [torch.zeros(3).long(), torch.zeros(1).long()])
    with pytest.raises(UserError, match="no documents"):
        evaluate_by_position(learner, [])
    with pytest.raises(UserError, match="batch of 0"):
        evaluate_by_position(learner, draw_documents([5]), batch=0)
