"""Rows of a cache are independent, can be moved about, and outlive the process as files."""

import pytest
import torch
from hf_case import as_hf, read_pieces
from tiny_learner import BOS, draw_tokens, tiny_learner

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.hf.state_ttt_e2e import StateError
from ttt_megatron.serving.session import Session


@pytest.fixture
def model():
    return as_hf(tiny_learner(suffix=2), BOS)


def read(model, tokens, cache=None, **options):
    return read_pieces(model, tokens, [tokens.shape[1]], cache, **options)


def test_a_clone_goes_its_own_way_and_reset_starts_over(model):
    tokens = draw_tokens(2, 30)
    expected, _ = read(model, tokens)
    _, cache = read(model, tokens[:, :14])
    twin = cache.clone()
    read(model, draw_tokens(2, 10, seed=9), cache)
    assert torch.equal(
        read(model, tokens[:, 14:], twin)[0],
        read(model, tokens[:, 14:], read(model, tokens[:, :14])[1])[0],
    )
    torch.testing.assert_close(expected, read(model, tokens, cache.reset())[0], rtol=0, atol=0)
    assert cache.detach() is cache


def test_rows_can_be_reordered_repeated_and_dropped(model):
    tokens = draw_tokens(3, 18)
    ends = draw_tokens(4, 9, seed=4)
    _, cache = read(model, tokens)
    cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    logits, _ = read(model, ends, cache)
    for row, source in enumerate([2, 0, 0, 1]):
        alone = read(model, tokens[source : source + 1])[1]
        torch.testing.assert_close(read(model, ends[row : row + 1], alone)[0][0], logits[row])
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.batch == 1
    cache.batch_repeat_interleave(3)
    assert cache.positions == [27, 27, 27]
    with pytest.raises(IndexError, match="none with the index 3"):
        cache.reorder([3])


def test_caches_at_different_positions_go_into_one_batch(model):
    lengths, ends = [3, 21, 9], draw_tokens(3, 8, seed=4)
    texts = [draw_tokens(1, n, seed=n) for n in lengths]
    alone = [read(model, text)[1] for text in texts]
    for cache in alone:
        cache.begin_learning(model.initial_fast_weights())
    together = TTTE2ECache.stack([cache.clone() for cache in alone])
    assert together.positions == lengths
    logits, _ = read_pieces(model, ends, [1], together)
    for row, cache in enumerate(alone):
        expected, cache = read_pieces(model, ends[row : row + 1], [1], cache)
        torch.testing.assert_close(logits[row], expected[0])
        left = together.select([row])
        for mine, own in zip(left.fast, cache.fast, strict=True):
            torch.testing.assert_close(mine, own)
    plain = read(model, texts[0], ttt=False)[1]
    with pytest.raises(ValueError, match="with and without inner steps"):
        TTTE2ECache.stack([alone[0], plain])


@pytest.mark.parametrize("position", [1, 4, 5, 12, 27])
@pytest.mark.parametrize("window", [1, 8, None])
def test_a_saved_row_is_the_row(tmp_path, window, position):
    model = as_hf(tiny_learner(suffix=3, window=window), BOS)
    tokens, more = draw_tokens(2, position), draw_tokens(2, 13, seed=7)
    _, cache = read(model, tokens)
    info = cache.save(tmp_path / "row.state", model, row=1)
    assert info["error"] == 0.0
    loaded = TTTE2ECache.load(tmp_path / "row.state", model)
    assert (loaded.positions, loaded.steps) == ([position], [cache.steps[1]])
    loaded.save(tmp_path / "again.state", model)
    assert (tmp_path / "again.state").read_bytes() == (tmp_path / "row.state").read_bytes()
    alone = cache.select([1])
    assert torch.equal(read(model, more[1:], loaded)[0], read(model, more[1:], alone)[0])


@pytest.mark.parametrize("position", [3, 8, 21])
def test_a_state_goes_from_the_engine_to_transformers_and_back(tmp_path, position):
    learner = tiny_learner(suffix=2)
    model = as_hf(learner, BOS)
    tokens, more = draw_tokens(1, position), draw_tokens(1, 11, seed=8)
    session = Session(learner, bos_id=BOS)
    session.read(tokens)
    session.save(tmp_path / "engine.state")
    cache = TTTE2ECache.load(tmp_path / "engine.state", model)
    expected = session.read(more)
    torch.testing.assert_close(read(model, more, cache.clone())[0], expected)
    cache.save(tmp_path / "hf.state", model)
    back = Session(learner, bos_id=BOS)
    back.load(tmp_path / "hf.state")
    assert torch.equal(back.read(more), expected)


def test_a_state_without_inner_steps_stays_so(tmp_path, model):
    tokens = draw_tokens(1, 10)
    _, cache = read(model, tokens, ttt=False)
    cache.save(tmp_path / "plain.state", model)
    loaded = TTTE2ECache.load(tmp_path / "plain.state", model)
    assert not loaded.learns
    assert torch.equal(read(model, tokens, loaded)[0], read(model, tokens, cache)[0])


def test_a_state_of_another_model_or_of_nothing_is_refused(tmp_path, model):
    _, cache = read(model, draw_tokens(1, 10))
    cache.save(tmp_path / "row.state", model)
    other = as_hf(tiny_learner(suffix=2, seed=4), BOS)
    with pytest.raises(StateError, match="another base model"):
        TTTE2ECache.load(tmp_path / "row.state", other)
    read(model.bfloat16().float(), draw_tokens(1, 10))[1].save(tmp_path / "single.state", model)
    with pytest.raises(StateError, match="read in float32 and this model computes in bfloat16"):
        TTTE2ECache.load(tmp_path / "single.state", model.bfloat16())
    with pytest.raises(ValueError, match="read nothing"):
        TTTE2ECache(model.config).save(tmp_path / "empty.state", model)


def test_the_hash_follows_the_weights_and_the_settings():
    model = as_hf(tiny_learner(suffix=2), BOS)
    first = model.base_hash()
    with torch.no_grad():
        model.model.final_norm.weight[0] += 1
    second = model.base_hash()
    model.config.ttt = {"inner_lr": 0.5}
    model._hash = None
    assert len({first, second, model.base_hash()}) == 3


def test_the_cache_does_not_grow_with_the_text(model):
    _, cache = read(model, draw_tokens(2, 20))
    held = cache.nbytes
    for seed in range(4):
        read(model, draw_tokens(2, 23, seed), cache)
        assert cache.nbytes == held
    config = model.config
    ring = config.inner["window_size"] - 1 + config.inner["chunk_size"] + 1
    kv = ring * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    fast = sum(w.numel() for w in model.initial_fast_weights())
    pending = (config.inner["chunk_size"] + 1) * (config.hidden_size + 1)
    assert held == 8 * 2 * (kv + fast + pending + config.hidden_size)


def test_what_was_learnt_cannot_be_cut_off_again(model):
    _, cache = read(model, draw_tokens(1, 9))
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(4)
