"""Decoded text and its loss under another model."""

import json

import numpy as np
import pytest
import torch

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.data.tokenizer import ByteTokenizer, train_bpe
from ttt_megatron.evaluation.decoding import (
    HELD_OUT,
    PAPER_SAMPLING,
    Judge,
    decode,
    decoding_report,
)
from ttt_megatron.evaluation.decoding_plot import draw_decoding
from ttt_megatron.meta.learner import Learner
from ttt_megatron.serving.sampling import SamplingSettings

TEXTS = ("the whale swam on and on past the ship", "a night of wind and of rain upon the sea.")
BYTES = ByteTokenizer()


def learner(vocab_size, seed=1):
    model = ModelConfig(
        vocab_size=vocab_size,
        num_layers=2,
        num_suffix_layers=1,
        hidden_size=16,
        num_heads=2,
        ffn_hidden_size=24,
        window_size=8,
        init_std=0.25,
    )
    inner = InnerConfig(chunk_size=4)
    return Learner(model, inner, dtype=torch.float64, seed=seed).eval()


@pytest.fixture(scope="module")
def prompts():
    return torch.tensor([BYTES.encode_document(text)[:24].tolist() for text in TEXTS])


@pytest.fixture(scope="module")
def decoded(prompts):
    return decode(learner(260), BYTES, prompts, 11, inner_steps=True, batch=2)


def test_decoding_is_reproducible_and_stays_in_the_text(prompts, decoded):
    assert decoded.shape == (2, 11)
    again = decode(learner(260), BYTES, prompts, 11, inner_steps=True, batch=2)
    other = decode(learner(260), BYTES, prompts, 11, inner_steps=True, batch=2, seed=1)
    assert torch.equal(decoded, again)
    assert not torch.equal(decoded, other)
    # Ids from 256 on are BOS and rows that no token has.
    assert int(decoded.max()) < 256


def test_a_model_that_wants_a_new_document_is_held_to_this_one(prompts):
    eager = learner(257)
    with torch.no_grad():
        eager.model.head_weight.zero_()
        eager.model.head_weight[256] = 5.0
        eager.model.final_norm.weight.fill_(1.0)
    greedy = SamplingSettings(temperature=0.0)
    found = decode(eager, BYTES, prompts, 3, inner_steps=False, sampling=greedy)
    assert int(found.max()) < 256


def test_a_judge_of_the_same_tokenizer_reads_the_tokens(prompts, decoded):
    other = learner(260, seed=2)
    judge = Judge(learner=other, tokenizer=BYTES, inner_steps=True, batch=2)
    judged = judge.judge(prompts, decoded, BYTES, retokenize=False)
    rows = torch.cat((prompts, decoded), dim=1)
    with torch.no_grad():
        output = other(rows[:, :-1], rows[:, 1:], torch.ones(2, 34).bool(), inner_steps=True)
    expected = output.token_nll[:, -11:].sum(dim=1)
    assert judged.nll == pytest.approx(expected.numpy(), rel=1e-11)
    assert judged.tokens.tolist() == [11, 11]
    assert judged.mean(by_byte=False).mean == pytest.approx(float(expected.sum()) / 22)


def test_a_judge_of_another_tokenizer_reads_the_text(prompts):
    bpe = train_bpe(iter(TEXTS * 20), 280)
    judge = Judge(learner=learner(bpe.vocab_size), tokenizer=bpe, inner_steps=False, batch=1)
    endings = ["ship, and ", "on the sea"]
    continuations = torch.tensor([BYTES.encode(text) for text in endings])
    judged = judge.judge(prompts, continuations, BYTES, retokenize=True)
    assert judged.texts == endings
    assert judged.text_bytes.tolist() == [10, 10]
    before = [bpe.encode_document(text[:23]) for text in TEXTS]
    for row, ending in enumerate(endings):
        after = bpe.encode_array(ending)
        assert judged.tokens[row] == len(after) < 10
        ids = torch.from_numpy(np.concatenate((before[row], after)))[None]
        with torch.no_grad():
            output = judge.learner(
                ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:]).bool(), inner_steps=False
            )
        expected = float(output.token_nll[0, -len(after) :].sum())
        assert judged.nll[row] == pytest.approx(expected, rel=1e-11)
    assert judged.mean(by_byte=True).mean == pytest.approx(judged.nll.sum() / 20)


def test_report_and_picture(prompts, decoded, tmp_path):
    judge = Judge(learner=learner(260, seed=2), tokenizer=BYTES, inner_steps=True)
    true = torch.tensor([BYTES.encode(text[23:34]) for text in TEXTS])
    judged = {
        name: judge.judge(prompts, tokens, BYTES, retokenize=False)
        for name, tokens in (("on", decoded), (HELD_OUT, true))
    }
    report = decoding_report(
        judged, ["a", "b"], prefill=24, decoded=11, by_byte=False, about={"judge": "there"}
    )
    values = json.loads(report.to_json())
    assert values["unit"] == "token"
    gap = values["judgements"]["on"]["minus_held_out"]["mean"]
    assert gap == pytest.approx((judged["on"].nll.sum() - judged[HELD_OUT].nll.sum()) / 22)
    assert report.finite_metrics()["decode/held-out_text"] == judged[HELD_OUT].mean(False).mean
    assert "nats a token" in report.markdown()
    path = tmp_path / "decode.png"
    draw_decoding(judged, path, "test", by_byte=False)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_sampling_is_the_papers():
    assert SamplingSettings(temperature=1.0, top_p=0.95, repetition_penalty=1.1) == PAPER_SAMPLING
