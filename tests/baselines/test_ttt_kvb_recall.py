"""What TTT-KVB is for: a text that comes again is foretold, although no window reaches back to it.

Random texts of 32 tokens out of 16, three times each; a window of 4 never sees the time before.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from ttt_megatron.baselines.ttt_kvb_swa import SWATTTKVB
from ttt_megatron.baselines.ttt_kvb_work import initial_value
from ttt_megatron.config.mixers import TTTKVBConfig
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.init import draw
from ttt_megatron.model.slots import Slots
from ttt_megatron.model.transformer import LanguageModel

VOCABULARY, PERIOD, TIMES, STEPS = 16, 32, 3, 400
CHANCE = math.log(VOCABULARY)
TTT_MLP = TTTKVBConfig(chunk_size=PERIOD)
LACT = TTTKVBConfig(
    chunk_size=PERIOD,
    fast_mlp="swiglu",
    expansion=1.0,
    loss="dot",
    output_rule="previous",
    rate_form="softplus",
    rate=0.1,
    average=False,
    weight_norm=True,
)


def texts(rows, generator):
    once = torch.randint(VOCABULARY, (rows, PERIOD), generator=generator)
    return once.repeat(1, TIMES)


def model_of(mixers, settings):
    config = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=2,
        num_suffix_layers=0,
        hidden_size=32,
        num_heads=2,
        ffn_hidden_size=64,
        window_size=4,
        mixers=mixers,
        ttt_kvb=settings,
    )
    slots = Slots(mixers={"swa_ttt_kvb": SWATTTKVB})
    model = LanguageModel(config, slots)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(index)
        own = initial_value(name, parameter.shape, generator, settings)
        parameter.data.copy_(draw(name, parameter.shape, config, 0) if own is None else own)
    return model


def losses(model, tokens):
    """[b, T − 1], the loss of every token but the first."""
    x = model.embed(tokens[:, :-1], torch.float32)
    hidden = model.final_norm(model.plain_blocks(x, model.rotations(0, x.shape[1], x)))
    return F.cross_entropy(model.logits(hidden).mT, tokens[:, 1:], reduction="none")


def trained(mixers, settings):
    """Mean losses of unseen texts, the first time and later ones, after training."""
    model = model_of(mixers, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / STEPS)
        optimizer.zero_grad()
        losses(model, texts(16, generator)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        found = losses(model, texts(64, torch.Generator().manual_seed(99)))
    first, later = found[:, : PERIOD - 1].mean().item(), found[:, PERIOD:].mean().item()
    print(f"{mixers}: {first:.3f} the first time, {later:.3f} later; chance {CHANCE:.3f}")
    return first, later


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixers", "settings", "bound"),
    [
        ("attention", TTT_MLP, None),
        ("swa_ttt_kvb", TTT_MLP, 0.5),
        ("swa_ttt_kvb", LACT, 1.6),
    ],
    ids=["attention", "TTT-MLP", "LaCT"],
)
def test_a_text_that_comes_again(mixers, settings, bound):
    first, later = trained(mixers, settings)
    assert first > CHANCE - 0.05
    if bound is None:
        assert later > CHANCE - 0.05
    else:
        assert later < bound
