"""Decoding goes through the same reading, and text comes out character by character."""

import pytest
import torch
from tiny_learner import BOS, draw_tokens, tiny_learner

from ttt_megatron.data.tokenizer import ByteTokenizer, train_bpe
from ttt_megatron.serving.generation import TextStream, generate
from ttt_megatron.serving.sampling import Sampler, SamplingSettings
from ttt_megatron.serving.session import Session

GREEDY = SamplingSettings(temperature=0)


def continued(learner, prompt, count, settings, **options):
    session = Session(learner, prompt.shape[0], bos_id=BOS, **options)
    session.read(prompt)
    return torch.cat(list(generate(session, Sampler(settings, seed=7), count)), dim=1), session


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(repetition_penalty=1.3)])
def test_decoding_twice_is_identical(settings):
    learner, prompt = tiny_learner(), draw_tokens(2, 11)
    first, _ = continued(learner, prompt, 20, settings)
    second, _ = continued(learner, prompt, 20, settings)
    assert torch.equal(first, second)


def test_generated_tokens_train_the_model_like_read_ones():
    learner, prompt = tiny_learner(), draw_tokens(2, 11)
    tokens, session = continued(learner, prompt, 20, GREEDY)
    assert session.position == 31
    assert session.steps_taken == 7
    reading = Session(learner, 2, bos_id=BOS)
    logits = reading.read(torch.cat((prompt, tokens), dim=1))
    assert torch.equal(logits[:, 10:-1].argmax(-1), tokens)
    for actual, expected in zip(session.fast_weights, reading.fast_weights, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_without_inner_steps_nothing_moves_and_other_tokens_come():
    learner, prompt = tiny_learner(), draw_tokens(2, 11)
    stepped, _ = continued(learner, prompt, 30, GREEDY)
    plain, session = continued(learner, prompt, 30, GREEDY, inner_steps=False)
    assert session.steps_taken == 0
    assert not torch.equal(stepped, plain)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_text_comes_out_whole_characters_at_a_time(kind):
    text = "naïve 한국어 — 🙂🙂 end of it"
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe(iter([text] * 3), 300)
    stream = TextStream(tokenizer.decode)
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join([*parts, stream.finish()]) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert sum(bool(part) for part in parts) > 5


def test_bytes_that_are_no_text_do_not_hold_the_stream_up():
    stream = TextStream(ByteTokenizer().decode)
    parts = [stream.push(token) for token in [0xFF, 0xFE, 0xFF, 0xFE, ord("a"), 0xE2, 0x82]]
    assert parts[4] == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""
