"""Reading in pieces, at once and by the learner's evaluation are the same thing."""

import pytest
import torch
from tiny_learner import BOS, VOCABULARY, draw_tokens, tiny_learner

from ttt_megatron.serving.session import Session


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def read_in_pieces(session, tokens, sizes):
    """Logits of reading in pieces of these sizes, the last size repeated to the end."""
    logits, start = [], 0
    sizes = list(sizes)
    while start < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(session.read(tokens[:, start : start + size]))
        start += size
    return torch.cat(logits, dim=1)


def evaluate(learner, tokens, **options):
    """The learner's evaluation of [b, T + 1]: logits [b, T, V] and the whole output."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    num_chunks = -(-inputs.shape[1] // learner.inner.chunk_size)
    with torch.no_grad():
        output = learner(
            inputs, targets, targets != BOS, logits_of=tuple(range(num_chunks)), **options
        )
    return torch.cat([output.logits[i] for i in range(num_chunks)], dim=1), output


@pytest.mark.parametrize("window", [1, 3, 8, None])
@pytest.mark.parametrize("suffix", [1, 2, 3])
def test_reading_at_once_equals_the_learners_evaluation(suffix, window):
    learner = tiny_learner(suffix=suffix, window=window)
    tokens = draw_tokens(2, 30)
    expected, output = evaluate(learner, tokens[:, :-1])
    session = Session(learner, 2, bos_id=BOS)
    assert_close(session.read(tokens[:, :-2]), expected)
    for actual, fast in zip(session.fast_weights, output.fast_weights, strict=True):
        assert_close(actual, fast)
    assert_close(session.drift, output.drift)
    assert session.drift.min() > 0.05
    assert session.steps_taken == 6


@pytest.mark.parametrize("window", [3, 8, None])
@pytest.mark.parametrize("sizes", [[1], [3], [5], [4], [1, 4], [2, 9, 1, 30], [7, 1]])
def test_pieces_of_any_size_equal_reading_at_once(sizes, window):
    learner = tiny_learner(suffix=3, window=window)
    tokens = draw_tokens(2, 30)
    whole, pieces = Session(learner, 2, bos_id=BOS), Session(learner, 2, bos_id=BOS)
    assert_close(read_in_pieces(pieces, tokens, sizes), whole.read(tokens))
    assert pieces.steps_taken == whole.steps_taken == 7
    assert pieces.position == whole.position == 30
    for actual, expected in zip(pieces.fast_weights, whole.fast_weights, strict=True):
        assert_close(actual, expected)
    assert_close(pieces.next_logits, whole.next_logits)


def test_the_step_waits_for_the_token_after_the_chunk():
    learner = tiny_learner()
    tokens = draw_tokens(1, 9)
    session = Session(learner, bos_id=BOS)
    session.read(tokens[:, :8])
    assert session.steps_taken == 1
    _, before = evaluate(learner, tokens)
    for actual, expected in zip(session.fast_weights, before.fast_weights, strict=True):
        assert_close(actual, expected)
    session.read(tokens[:, 8:])
    assert session.steps_taken == 2
    _, after = evaluate(learner, tokens, final_step=True)
    for actual, expected in zip(session.fast_weights, after.fast_weights, strict=True):
        assert_close(actual, expected)


def test_predicting_bos_teaches_nothing():
    learner = tiny_learner()
    tokens = draw_tokens(1, 6)
    tokens[0, 1:5] = BOS
    session = Session(learner, bos_id=BOS)
    session.read(tokens)
    assert session.steps_taken == 1
    assert session.drift.item() == 0.0
    unmasked = Session(learner)
    unmasked.read(tokens)
    assert unmasked.drift.item() > 0.0


def test_long_reads_are_cut_into_spans(monkeypatch):
    learner = tiny_learner()
    tokens = draw_tokens(1, 40)
    whole, spans = Session(learner, bos_id=BOS), Session(learner, bos_id=BOS)
    expected = whole.read(tokens)
    monkeypatch.setattr("ttt_megatron.serving.session._SPAN_TOKENS", 8)
    assert_close(read_in_pieces(spans, tokens, [3, 37]), expected)


@pytest.mark.parametrize("inner_steps", [True, False])
def test_rows_do_not_see_one_another(inner_steps):
    learner = tiny_learner()
    tokens = draw_tokens(3, 21)
    together = Session(learner, 3, inner_steps, bos_id=BOS)
    logits = together.read(tokens)
    for row in range(3):
        alone = Session(learner, 1, inner_steps, bos_id=BOS)
        assert_close(alone.read(tokens[row : row + 1]), logits[row : row + 1])
        for own, shared in zip(alone.fast_weights, together.fast_weights, strict=True):
            assert_close(own, shared[row : row + 1])


@pytest.mark.parametrize("suffix", [0, 2])
@pytest.mark.parametrize("sizes", [[30], [1], [5, 7]])
def test_without_inner_steps_it_is_the_plain_model(suffix, sizes):
    learner = tiny_learner(suffix=suffix)
    tokens = draw_tokens(2, 30)
    session = Session(learner, 2, inner_steps=False)
    with torch.no_grad():
        expected = learner.model.logits(learner.run_prefix(tokens, inner_steps=False))
    assert_close(read_in_pieces(session, tokens, sizes), expected)
    assert session.steps_taken == 0
    assert session.drift.tolist() == [0.0, 0.0]


def test_the_mode_decides_unless_told():
    assert Session(tiny_learner(mode="naive")).inner_steps
    assert not Session(tiny_learner(mode="off")).inner_steps
    assert Session(tiny_learner(mode="off"), inner_steps=True).inner_steps
    assert not Session(tiny_learner(suffix=0)).inner_steps


@pytest.mark.parametrize("sizes", [[30], [1], [5]])
@pytest.mark.parametrize("changed", [1, 7, 8, 18, 29])
def test_a_token_changes_no_logits_before_it(sizes, changed):
    learner = tiny_learner()
    tokens = draw_tokens(2, 30)
    other = tokens.clone()
    other[:, changed] = (tokens[:, changed] + 1) % VOCABULARY
    first = read_in_pieces(Session(learner, 2, bos_id=BOS), tokens, sizes)
    second = read_in_pieces(Session(learner, 2, bos_id=BOS), other, sizes)
    assert torch.equal(first[:, :changed], second[:, :changed])
    assert (first[:, changed] != second[:, changed]).any(-1).all()


@pytest.mark.parametrize("changed", [1, 8, 18, 28])
def test_a_token_changes_nothing_before_it_in_evaluation_and_training(changed):
    learner = tiny_learner()
    tokens = draw_tokens(2, 29)
    other = tokens.clone()
    other[:, changed] = tokens[:, changed] % (VOCABULARY - 1) + 1
    runs = [evaluate(learner, each) for each in (tokens, other)]
    assert torch.equal(runs[0][0][:, :changed], runs[1][0][:, :changed])
    nll = [learner(t[:, :-1], t[:, 1:], t[:, 1:] != BOS).token_nll for t in (tokens, other)]
    # The changed token is the target of the position before it.
    assert torch.equal(nll[0][:, : changed - 1], nll[1][:, : changed - 1])
    assert not torch.equal(nll[0][:, changed - 1], nll[1][:, changed - 1])
    if changed < 28:
        assert (nll[0][:, changed:] != nll[1][:, changed:]).any()


def test_the_state_does_not_grow():
    session = Session(tiny_learner(), 2, bos_id=BOS)
    session.read(draw_tokens(2, 18))
    held = session.nbytes
    for seed in range(5):
        session.read(draw_tokens(2, 20, seed))
        assert session.nbytes == held
    unbounded = Session(tiny_learner(window=None), 2)
    unbounded.read(draw_tokens(2, 18))
    held = unbounded.nbytes
    unbounded.read(draw_tokens(2, 20))
    assert unbounded.nbytes > held


def test_the_state_keeps_no_graph_and_no_larger_tensors():
    session = Session(tiny_learner(suffix=3), 1)
    session.read(draw_tokens(1, 27))
    pending = session._pending
    tensors = [*session.fast_weights, pending.entered, pending.tokens, session._last_hidden]
    for entries in (session._early.entries, session._later_kv.entries):
        tensors += [x for entry in entries for x in entry]
    for tensor in tensors:
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_clone_goes_its_own_way_and_reset_starts_over():
    learner = tiny_learner()
    tokens = draw_tokens(1, 30)
    session = Session(learner, bos_id=BOS)
    expected = session.read(tokens)
    session.reset()
    session.read(tokens[:, :14])
    twin = session.clone()
    session.read(draw_tokens(1, 10, seed=9))
    assert_close(twin.read(tokens[:, 14:]), expected[:, 14:])
    session.reset()
    assert torch.equal(session.read(tokens), expected)


def test_prefill_is_read_without_the_logits():
    learner = tiny_learner()
    tokens = draw_tokens(2, 22)
    reading, filling = Session(learner, 2), Session(learner, 2)
    logits = reading.read(tokens)
    assert_close(filling.prefill(tokens), logits[:, -1])
    assert torch.equal(filling.fast_weights[0], reading.fast_weights[0])


def test_bfloat16_activations_keep_float32_fast_weights():
    reference = tiny_learner()
    learner = reference.__class__(
        reference.model.config, reference.inner, compute_dtype=torch.bfloat16
    )
    session = Session(learner, bos_id=BOS)
    logits = session.read(draw_tokens(1, 14))
    assert logits.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in session.fast_weights)
    assert session.drift.item() > 0.0


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "shape"),
        (torch.zeros(1, 0, dtype=torch.int64), "shape"),
        (torch.zeros(1, 3, dtype=torch.int32), "dtype"),
        (torch.full((1, 3), VOCABULARY), f"token {VOCABULARY} is outside"),
        (torch.full((1, 3), -1), "token -1 is outside"),
    ],
)
def test_tokens_it_cannot_read_are_refused(tokens, message):
    session = Session(tiny_learner())
    with pytest.raises(ValueError, match=message):
        session.read(tokens)
    with pytest.raises(ValueError, match="read nothing"):
        _ = session.next_logits
