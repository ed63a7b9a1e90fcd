"""The exported model computes what the engine does, in pieces, ragged batches and with padding."""

import pytest
import torch
from hf_case import as_hf, read_pieces
from tiny_learner import BOS, VOCABULARY, draw_tokens, tiny_learner

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.serving.session import Session


def assert_close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def padded(rows, width):
    """Rows of tokens filled up on the left, and the mask: [b, width] each."""
    tokens = torch.full((len(rows), width), VOCABULARY - 1)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return tokens, mask


@pytest.mark.parametrize("window", [1, 3, 8, None])
@pytest.mark.parametrize("suffix", [0, 1, 2, 3])
def test_reading_equals_the_engines_session(suffix, window):
    learner = tiny_learner(suffix=suffix, window=window)
    model, tokens = as_hf(learner, BOS), draw_tokens(2, 30)
    session = Session(learner, 2, bos_id=BOS)
    expected = session.read(tokens)
    for sizes in ([30], [3, 1, 9, 17], [1] if window == 8 else [5]):
        logits, cache = read_pieces(model, tokens, sizes)
        assert_close(logits, expected)
        assert cache.positions == [30, 30]
        if suffix:
            assert cache.steps == [session.steps_taken] * 2 == [7, 7]
            for actual, fast in zip(cache.fast, session.fast_weights, strict=True):
                assert_close(actual, fast)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_embeddings": False},
        {"post_norm": False},
        {"qk_norm": False, "post_norm": False, "num_kv_heads": None},
        {"prime_ffn_hidden_size": 40},
    ],
)
def test_every_kind_of_model_is_the_engines(settings):
    shape = {
        "vocab_size": VOCABULARY,
        "num_layers": 3,
        "num_suffix_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 24,
        "window_size": 6,
        "init_std": 0.25,
    }
    learner = Learner(
        ModelConfig(**{**shape, **settings}),
        InnerConfig(chunk_size=4, lr=0.7, clip=0.0),
        dtype=torch.float64,
    )
    tokens = draw_tokens(2, 19)
    expected = Session(learner, 2, bos_id=BOS).read(tokens)
    assert_close(read_pieces(as_hf(learner, BOS), tokens, [7])[0], expected)


@pytest.mark.parametrize("ttt", [True, False])
def test_rows_of_any_length_equal_each_alone(ttt):
    learner = tiny_learner(suffix=2)
    model, tokens = as_hf(learner, BOS), draw_tokens(4, 27)
    lengths = [27, 3, 12, 9]
    rows = [tokens[i, :n] for i, n in enumerate(lengths)]
    ids, mask = padded(rows, 27)
    more = draw_tokens(4, 11, seed=5)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, ttt=ttt)
        after = [model(more[:, i : i + 1], cache=output.cache).logits for i in range(more.shape[1])]
    for i, row in enumerate(rows):
        alone, cache = read_pieces(model, row.unsqueeze(0), [27], ttt=ttt)
        assert_close(output.logits[i, 27 - len(row) :], alone[0])
        follows, cache = read_pieces(model, more[i : i + 1], [11], cache)
        assert_close(torch.cat(after, dim=1)[i], follows[0])
        assert output.cache.positions[i] == cache.positions[0] == len(row) + 11
        assert output.cache.steps[i] == cache.steps[0]
        for together, own in zip(output.cache.fast, cache.fast, strict=True):
            assert_close(together[i], own[0])


def test_padding_may_be_anywhere_and_a_row_may_have_no_token():
    model, tokens = as_hf(tiny_learner(), BOS), draw_tokens(3, 12)
    mask = torch.ones_like(tokens)
    mask[0, 9:] = 0
    mask[1, [2, 5, 6]] = 0
    mask[2] = 0
    output = model(tokens, attention_mask=mask)
    assert output.cache.positions == [9, 9, 0]
    assert output.logits.isfinite().all()
    for row in range(2):
        chosen = mask[row].bool()
        alone, _ = read_pieces(model, tokens[row : row + 1, chosen], [12])
        assert_close(output.logits[row, chosen], alone[0])
    later = model(tokens[:, :5], cache=output.cache)
    alone, _ = read_pieces(model, tokens[2:, :5], [5])
    assert_close(later.logits[2], alone[0])


@pytest.mark.parametrize("suffix", [0, 2])
def test_ttt_off_is_the_plain_model_with_and_without_gradients(suffix):
    learner = tiny_learner(suffix=suffix)
    model, tokens = as_hf(learner, BOS), draw_tokens(2, 30)
    expected = Session(learner, 2, inner_steps=False).read(tokens)
    assert_close(read_pieces(model, tokens, [5, 25], ttt=False)[0], expected)
    ids, mask = padded([tokens[0], tokens[1, :20]], 30)
    output = model(ids, attention_mask=mask, labels=ids, ttt=False)
    assert_close(output.logits[0], expected[0])
    assert_close(output.logits[1, 10:], expected[1, :20])
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_predicting_bos_teaches_nothing():
    model = as_hf(tiny_learner(), BOS)
    tokens = torch.full((1, 9), BOS)
    cache = model(tokens).cache
    assert cache.steps == [2]
    for now, start in zip(cache.fast, model.initial_fast_weights(), strict=True):
        assert torch.equal(now[0], start)


def test_the_loss_is_of_the_next_token_and_kept_logits_are_the_last():
    model, tokens = as_hf(tiny_learner(), BOS), draw_tokens(2, 21)
    labels = tokens.clone()
    labels[:, :7] = -100
    with torch.no_grad():
        output = model(tokens, labels=labels)
        kept = model(tokens, logits_to_keep=3)
    nll = -output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    assert_close(output.loss, nll[:, 6:].mean())
    assert_close(kept.logits, output.logits[:, -3:])
    as_tuple = model(tokens, return_dict=False, use_cache=False)
    assert len(as_tuple) == 1
    assert_close(as_tuple[0], output.logits)


def test_in_bfloat16_fast_weights_stay_float32_and_float32_is_exact_to_rounding():
    learner = tiny_learner(suffix=2)
    model, tokens = as_hf(learner, BOS), draw_tokens(2, 30)
    exact = read_pieces(model, tokens, [30])[0]
    single = read_pieces(model.float(), tokens, [1])[0]
    assert_close(single.double(), exact, 1e-5)
    logits, cache = read_pieces(model.bfloat16(), tokens, [3, 27])
    assert logits.dtype == torch.bfloat16
    assert {w.dtype for w in cache.fast} == {torch.float32}
    assert cache.keys[0].dtype == torch.bfloat16
    assert float((logits.double() - exact).norm() / exact.norm()) < 0.15


def test_reading_works_in_inference_mode():
    model, tokens = as_hf(tiny_learner(), BOS), draw_tokens(1, 14)
    expected, _ = read_pieces(model, tokens, [14])
    with torch.inference_mode():
        cache = model(tokens[:, :6]).cache
        logits = model(tokens[:, 6:], cache=cache).logits
    assert_close(logits.clone(), expected[:, 6:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.tensor([[1, VOCABULARY]])}, f"hold {VOCABULARY}"),
        ({"input_ids": torch.tensor([[-1, 2]])}, "hold -1"),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 3)},
            "attention_mask",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(arguments, message):
    model = as_hf(tiny_learner(), BOS)
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_a_cache_is_gone_on_with_as_it_began():
    model, tokens = as_hf(tiny_learner(), BOS), draw_tokens(2, 6)
    cache = model(tokens, ttt=False).cache
    with pytest.raises(ValueError, match="begun with ttt=False"):
        model(tokens, cache=cache, ttt=True)
    with pytest.raises(ValueError, match="1 rows and the cache 2"):
        model(tokens[:1], cache=cache)
    model.train()
    with pytest.raises(ValueError, match="no gradient for training"):
        model(tokens, labels=tokens)
