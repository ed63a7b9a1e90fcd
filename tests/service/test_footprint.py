"""Bytes of a row by the model's shape, held to what caches take."""

import pytest
import torch
from tiny_export import tiny_config

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.hf.modeling_ttt_e2e import TTTE2EForCausalLM
from ttt_megatron.service.footprint import fast_weight_count, row_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("length", [3, 70, 200])
def test_a_windowed_row_takes_what_was_said(dtype, learns, length):
    config = tiny_config(chunk=16, window=80)
    model = TTTE2EForCausalLM(config).to(dtype).eval()
    cache = TTTE2ECache(config, 1, ttt=learns)
    cache.begin_learning(model.initial_fast_weights())
    for piece in torch.arange(length).remainder(256).split(16):
        model(piece.unsqueeze(0), cache=cache)
    bound = row_bytes(config, dtype, length, learns=learns)
    assert cache.nbytes <= bound <= row_bytes(config, dtype, learns=learns)
    if length == 200:
        # All that a row of this model ever takes.
        assert cache.nbytes == bound == row_bytes(config, dtype, learns=learns)


def test_full_attention_grows_with_the_text():
    config = tiny_config(window=None)
    model = TTTE2EForCausalLM(config).eval()
    cache = TTTE2ECache(config, 1)
    cache.begin_learning(model.initial_fast_weights())
    for piece in torch.arange(300).remainder(256).split(50):
        model(piece.unsqueeze(0), cache=cache)
        assert cache.nbytes <= row_bytes(config, torch.float32, cache.positions[0])


def test_the_published_models_have_their_fast_weights():
    shapes = {11_501_568: (768, 1664, 3), 346_030_080: (2560, 5632, 8)}
    for count, (hidden, width, suffix) in shapes.items():
        config = tiny_config(
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=4 * suffix,
            ttt={"num_suffix_layers": suffix},
        )
        assert fast_weight_count(config) == count
