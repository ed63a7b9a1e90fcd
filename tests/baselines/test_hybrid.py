"""Models whose blocks mix tokens in different ways: windows here, everything there."""

import pytest
import torch
from tiny_learner import BOS, VOCABULARY, draw_tokens

from ttt_megatron.config import from_dict
from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.hf.state_ttt_e2e import StateError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.oracle import oracle
from ttt_megatron.serving.session import Session


def learner_of(mixers, *, layers=3, suffix=0, window=3, **inner):
    model = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=layers,
        num_suffix_layers=suffix,
        hidden_size=16,
        num_heads=4,
        ffn_hidden_size=24,
        window_size=window,
        mixers=mixers,
        init_std=0.25,
    )
    config = InnerConfig(chunk_size=4, clip=0.5, mode="meta" if suffix else "off", **inner)
    return Learner(model, config, dtype=torch.float64)


def read(session, tokens, size):
    return torch.cat([session.read(piece) for piece in tokens.split(size, dim=1)], dim=1)


def test_the_pattern_goes_on_over_the_blocks():
    kinds = ModelConfig(num_layers=7, mixers="attention, attention,full").mixer_kinds
    assert kinds == ["attention", "attention", "full"] * 2 + ["attention"]


@pytest.mark.parametrize(
    ("mixers", "layers", "suffix"),
    [
        ("attention,full", 3, 0),
        ("full,attention", 3, 0),
        ("full", 3, 0),
        ("full,attention", 4, 1),
    ],
)
def test_pieces_equal_one_read_and_the_whole_pass(mixers, layers, suffix):
    learner, tokens = learner_of(mixers, layers=layers, suffix=suffix), draw_tokens(2, 23)
    whole = Session(learner, 2, bos_id=BOS)
    expected = whole.read(tokens)
    for size in (1, 5, 8):
        session = Session(learner, 2, bos_id=BOS)
        torch.testing.assert_close(read(session, tokens, size), expected, rtol=1e-12, atol=1e-12)
        assert session.nbytes == whole.nbytes
    if not suffix:
        with torch.no_grad():
            plain = learner.model.logits(learner.run_prefix(tokens))
        torch.testing.assert_close(expected, plain, rtol=1e-12, atol=1e-12)


def test_a_block_of_full_attention_sees_what_windows_do_not():
    tokens = draw_tokens(1, 23)
    other = tokens.clone()
    other[0, 2] = tokens[0, 2] % (VOCABULARY - 1) + 1
    for mixers, sees in (("attention", False), ("attention,attention,full", True)):
        learner = learner_of(mixers)
        last = [Session(learner).prefill(each) for each in (tokens, other)]
        assert torch.equal(*last) != sees


def test_rows_are_moved_with_all_they_remember():
    learner, tokens = learner_of("attention,full"), draw_tokens(3, 18)
    session = Session(learner, 3)
    expected = Session(learner, 3).read(tokens)
    session.read(tokens[:, :7])
    twin = session.clone()
    session.select([2, 0])
    torch.testing.assert_close(session.read(tokens[[2, 0], 7:]), expected[[2, 0], 7:])
    torch.testing.assert_close(twin.read(tokens[:, 7:]), expected[:, 7:])


def test_inner_steps_go_through_a_prefix_of_full_attention():
    learner = learner_of("full,attention", layers=4, suffix=1)
    tokens = draw_tokens(2, 17)
    batch = tokens[:, :-1], tokens[:, 1:], tokens[:, 1:] != BOS
    loss = learner(*batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in learner.named_parameters()}
    learner.zero_grad()
    reference = oracle(learner.model, *batch, learner.settings(1.0, 16)).loss
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.mixers": "attention,fulll"}, "names 'fulll'.*did you mean full"),
        ({"model.mixers": "attention,full"}, "puts full into the last"),
        (
            {"model.mixers": "full", "model.num_suffix_layers": 0, "parallel.context": 2},
            "parallel.context = 2 passes",
        ),
        (
            {"model.mixers": "mamba2,attention", "parallel.tensor": 2},
            "mamba2 of model.mixers",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    base = {"model.num_layers": 4, "model.num_suffix_layers": 1, "inner.mode": "meta"}
    if settings.get("model.num_suffix_layers") == 0:
        base["inner.mode"] = "off"
    with pytest.raises(UserError, match=message):
        from_dict({**base, **settings})


def test_states_of_hybrids_are_not_kept(tmp_path):
    session = Session(learner_of("attention,full"))
    session.read(draw_tokens(1, 5))
    with pytest.raises(StateError, match="attention alone"):
        session.save(tmp_path / "x.state")
