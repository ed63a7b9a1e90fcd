"""A state put back goes on bit for bit, wherever in a chunk or window reading stopped."""

from dataclasses import replace

import pytest
import torch
from tiny_learner import BOS, draw_tokens, tiny_learner

from ttt_megatron.hf.state_ttt_e2e import StateError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.serving.session import Session
from ttt_megatron.serving.session_state import learner_hash

# In chunks of 4 under a window of 8: within the first chunk, at its end, before and after a
# step, at the window's border, far beyond it.
STOPS = [1, 3, 4, 5, 7, 8, 9, 12, 21]
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.float32, torch.bfloat16),
}


def learner_of(dtype, **options):
    """The tiny learner with parameters and activations of one of DTYPES."""
    tiny = tiny_learner(**options)
    parameters, compute = DTYPES[dtype]
    learner = Learner(
        tiny.model.config, tiny.inner, dtype=parameters, compute_dtype=compute, seed=3
    )
    return learner.eval()


def tensors_of(state):
    tensors = [*state.fast, *(x for kv in state.kv for x in kv)]
    return [*tensors, state.pending_tokens, state.pending_entered, state.last_hidden]


def assert_same_state(actual, expected):
    assert (actual.position, actual.steps) == (expected.position, expected.steps)
    for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_goes_on_alike(session, other, tokens):
    """Both read `tokens` in pieces that cross chunks; every logit and all left behind agree."""
    assert torch.equal(session.next_logits, other.next_logits)
    for piece in tokens[:, :7].split([1, 5, 1], dim=1):
        assert torch.equal(session.read(piece), other.read(piece))
    assert torch.equal(session.drift, other.drift)
    for row in range(session.batch):
        assert_same_state(session.state(row), other.state(row))


def reopened(session, learner, paths, **options):
    """A new session that loads every row of `session` from a file."""
    for row, path in enumerate(paths):
        session.save(path, row)
    fresh = Session(learner, **options)
    fresh.load(*paths)
    return fresh


@pytest.mark.parametrize(
    ("stop", "dtype"),
    [(stop, "bfloat16") for stop in STOPS]
    + [(stop, dtype) for stop in (3, 4, 5, 9) for dtype in ("float32", "float64")],
)
def test_saved_and_loaded_it_goes_on_bit_for_bit(stop, dtype, tmp_path):
    learner, tokens = learner_of(dtype, suffix=3), draw_tokens(2, 33)
    session = Session(learner, 2, bos_id=BOS)
    session.read(tokens[:, :stop])
    fresh = reopened(session, learner, [tmp_path / "0", tmp_path / "1"], bos_id=BOS)
    assert fresh.steps_taken == (stop - 1) // 4
    assert_goes_on_alike(fresh, session, tokens[:, stop:])


@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize(
    ("suffix", "inner_steps"), [(1, True), (2, True), (3, True), (0, False), (2, False)]
)
def test_for_every_shape_of_model(suffix, window, inner_steps, tmp_path):
    learner, tokens = learner_of("bfloat16", suffix=suffix, window=window), draw_tokens(1, 25)
    for stop in (4, 13):
        session = Session(learner, 1, inner_steps, bos_id=BOS)
        session.read(tokens[:, :stop])
        options = {"inner_steps": inner_steps, "bos_id": BOS}
        fresh = reopened(session, learner, [tmp_path / "state"], **options)
        assert_goes_on_alike(fresh, session, tokens[:, stop:])


def test_the_same_state_gives_the_same_file_again(tmp_path):
    learner, path = learner_of("bfloat16"), tmp_path / "again"
    session = Session(learner, 2, bos_id=BOS)
    session.read(draw_tokens(2, 14))
    fresh = reopened(session, learner, [tmp_path / "0", tmp_path / "1"], bos_id=BOS)
    fresh.save(path, 1)
    assert path.read_bytes() == (tmp_path / "1").read_bytes()
    assert path.read_bytes() != (tmp_path / "0").read_bytes()


def test_rows_of_several_sessions_go_on_in_one():
    learner, tokens = tiny_learner(suffix=3), draw_tokens(3, 30)
    pair, single = Session(learner, 2, bos_id=BOS), Session(learner, 1, bos_id=BOS)
    pair.read(tokens[:2, :14])
    single.read(tokens[2:, :14])
    # A session that has read something else before, as a server's would have.
    together = Session(learner, 5, bos_id=BOS)
    together.read(draw_tokens(5, 19, seed=8))
    together.restore([single.state(), pair.state(1), pair.state(0)])
    assert together.batch == 3
    logits = together.read(tokens[[2, 1, 0], 14:])
    torch.testing.assert_close(logits[:1], single.read(tokens[2:, 14:]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        logits[1:], pair.read(tokens[:2, 14:])[[1, 0]], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("stop", [0, 4, 14])
def test_selected_rows_go_on_as_they_would_from_their_states(stop):
    learner, tokens = learner_of("bfloat16", suffix=3), draw_tokens(3, 30)
    session = Session(learner, 3, bos_id=BOS)
    if stop:
        session.read(tokens[:, :stop])
    kept, other = session.clone(), Session(learner, 4, bos_id=BOS)
    kept.select([2, 0, 2, 1])
    if stop:
        other.restore([session.state(row) for row in (2, 0, 2, 1)])
    rest = tokens[[2, 0, 2, 1], stop : stop + 9]
    # The two copies of a row part ways.
    rest[2, 1:] = 5
    assert torch.equal(kept.read(rest), other.read(rest))
    assert not torch.equal(kept.fast_weights[0][0], kept.fast_weights[0][2])
    for row in range(4):
        assert_same_state(kept.state(row), other.state(row))
    # The session that was cloned has seen nothing of it.
    assert (session.batch, session.position, session.steps_taken) == (
        3,
        stop,
        max(0, stop - 1) // 4,
    )


def test_rows_that_are_not_there_are_refused():
    session = Session(tiny_learner(), 2)
    with pytest.raises(ValueError, match="no rows"):
        session.select([])
    for rows in ([2], [0, -1]):
        with pytest.raises(IndexError, match="of a session of 2"):
            session.select(rows)


def test_a_state_is_a_copy():
    learner, tokens = tiny_learner(suffix=3), draw_tokens(2, 30)
    session, twin = (Session(learner, 2, bos_id=BOS) for _ in range(2))
    for each in (session, twin):
        each.read(tokens[:, :14])
    taken = session.state(1)
    other = Session(learner, 1, bos_id=BOS)
    other.restore([taken])
    for tensor in tensors_of(taken):
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
    assert_goes_on_alike(session, twin, tokens[:, 14:])
    alone = Session(learner, 1, bos_id=BOS)
    alone.read(tokens[1:, :14])
    torch.testing.assert_close(other.next_logits, alone.next_logits, rtol=1e-12, atol=1e-12)
    assert other.drift.item() > 0.0


@pytest.mark.parametrize(("change", "bound"), [("bf16", 0.02), ("rank:8", 0.2), ("rank:1", 2.0)])
def test_a_lossy_change_shows_in_the_logits_as_little_as_its_error(change, bound, tmp_path):
    learner, tokens = tiny_learner(suffix=3), draw_tokens(1, 42)
    session = Session(learner, 1, bos_id=BOS)
    session.read(tokens[:, :26])
    info = session.save(tmp_path / "state", change=change)
    fresh = Session(learner, 1, bos_id=BOS)
    forgotten = Session(learner, 1, bos_id=BOS)
    fresh.load(tmp_path / "state")
    state = session.state()
    state.fast = [w[0] for w in forgotten.fast_weights]
    forgotten.restore([state])
    # What was seen last is kept as it was: only what is read from here on differs.
    assert torch.equal(fresh.next_logits, session.next_logits)
    expected = session.read(tokens[:, 26:])
    off = (fresh.read(tokens[:, 26:]) - expected).norm()
    without = (forgotten.read(tokens[:, 26:]) - expected).norm()
    assert 0.0 < off < without
    assert off / without < bound
    assert 0.0 < info["error"] < 1.0


def a_state(learner=None, length=14, **options):
    session = Session(learner or tiny_learner(), 1, bos_id=BOS, **options)
    session.read(draw_tokens(1, length))
    return session.state()


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    session = Session(tiny_learner(), 1, bos_id=BOS)
    session.read(draw_tokens(1, 9))
    before = session.state()
    fine = a_state()
    for states, message in [
        ([], "no states"),
        ([fine, a_state(length=13)], "row 1 is at position 13 and the first at 14"),
        ([a_state(inner_steps=False)], "read without inner steps"),
        ([a_state(tiny_learner(suffix=3))], "fast weights have other shapes"),
        ([a_state(tiny_learner(chunk=5))], "contradict one another"),
        ([a_state(tiny_learner(window=5))], "tensors have shapes"),
        ([a_state(learner_of("float32"))], "fast weights have other shapes"),
        ([replace(fine, steps=2)], "contradict one another"),
        ([replace(fine, kv=fine.kv[:2])], "tensors have shapes"),
        ([replace(fine, last_hidden=fine.last_hidden.float())], "computes in torch.float64"),
        ([replace(fine, pending_tokens=fine.pending_tokens + 50)], "outside the vocabulary"),
    ]:
        with pytest.raises(StateError, match=message):
            session.restore(states)
    with pytest.raises(StateError, match="read with inner steps"):
        Session(tiny_learner(), 1, inner_steps=False).restore([fine])
    assert_same_state(session.state(), before)
    with pytest.raises(ValueError, match="read nothing"):
        Session(tiny_learner()).state()


def test_a_file_belongs_to_one_model(tmp_path):
    path = tmp_path / "state"
    session = Session(tiny_learner(), 1, bos_id=BOS)
    session.read(draw_tokens(1, 9))
    session.save(path)
    Session(tiny_learner(), 1, bos_id=BOS).load(path)
    others = [(tiny_learner(seed=4), BOS), (tiny_learner(chunk=5), BOS), (tiny_learner(), None)]
    for learner, bos_id in others:
        with pytest.raises(StateError, match="belongs to another base model"):
            Session(learner, 1, bos_id=bos_id).load(path)


def test_a_learners_hash_is_of_its_weights_and_inner_loop():
    learner = tiny_learner()
    base = learner_hash(learner, BOS)
    assert base == learner_hash(tiny_learner(), BOS)
    others = [learner_hash(learner, 1), learner_hash(tiny_learner(seed=4), BOS)]
    others += [learner_hash(tiny_learner(window=9), BOS), learner_hash(learner_of("float32"), BOS)]
    with torch.no_grad():
        learner.model.final_norm.weight[3] += 1e-9
    assert len({base, *others, learner_hash(learner, BOS)}) == 6
