"""The mixers against those of transformers with the same weights, all in float64."""

import pytest
import torch
from mixer_case import draw_hidden, mixer_of, worst
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from ttt_megatron.config import mixers
from ttt_megatron.config.schema import ModelConfig

CONFIG = ModelConfig(
    hidden_size=24,
    num_heads=3,
    init_std=0.3,
    norm_eps=1e-5,
    mamba2=mixers.Mamba2Config(head_dim=8, state_size=6),
)


class _Float64ForFloat32:
    """torch as a module sees it that asks for float32 where it means to be exact."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def exact(monkeypatch):
    """Their casts to float32 go to float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in (modeling_mamba2, modeling_qwen3_next):
        monkeypatch.setattr(module, "torch", _Float64ForFloat32())


def theirs_mamba2(mixer):
    config = Mamba2Config(
        hidden_size=CONFIG.hidden_size,
        num_heads=mixer.heads,
        head_dim=mixer.settings.head_dim,
        state_size=mixer.settings.state_size,
        expand=mixer.settings.expand,
        conv_kernel=mixer.settings.conv_kernel,
        n_groups=1,
        chunk_size=16,
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=CONFIG.norm_eps,
        num_hidden_layers=1,
    )
    weights = {
        "in_proj.weight": mixer.linear_in.weight,
        "conv1d.weight": mixer.convolution.weight.unsqueeze(1),
        "conv1d.bias": mixer.convolution.bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "dt_bias": mixer.dt_bias,
        "norm.weight": mixer.output_norm.weight,
        "out_proj.weight": mixer.linear_out.weight,
    }
    return modeling_mamba2.Mamba2Mixer(config, layer_idx=0), weights


def theirs_gated_delta(mixer):
    """Their columns are grouped by head; queries, keys, values and gates lie apart here."""
    heads, keys, values = mixer.heads, mixer.key_dim, mixer.value_dim
    config = Qwen3NextConfig(
        hidden_size=CONFIG.hidden_size,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=keys,
        linear_value_head_dim=values,
        linear_conv_kernel_dim=mixer.convolution.weight.shape[1],
        rms_norm_eps=CONFIG.norm_eps,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    sizes = [heads * width for width in (keys, keys, values, values, 1, 1)]
    q, k, v, z, b, a = (w.unflatten(0, (heads, -1)) for w in mixer.linear_in.weight.split(sizes))
    weights = {
        "in_proj_qkvz.weight": torch.cat((q, k, v, z), dim=1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat((b, a), dim=1).flatten(0, 1),
        "conv1d.weight": mixer.convolution.weight.unsqueeze(1),
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
        "norm.weight": mixer.output_norm.weight,
        "out_proj.weight": mixer.linear_out.weight,
    }
    return modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, layer_idx=0), weights


CASES = {
    "mamba2": theirs_mamba2,
    "gated_delta": theirs_gated_delta,
}


@pytest.mark.parametrize("length", [1, 21, 130])
@pytest.mark.parametrize("kind", CASES)
def test_values_and_gradients_are_theirs(kind, length, exact):
    """Of the inputs and, through the mapping of the weights, of every parameter."""
    mixer = mixer_of(kind, CONFIG)
    module, weights = CASES[kind](mixer)
    module = module.double()
    assert set(weights) == {name for name, _ in module.named_parameters()}
    x = draw_hidden(2, length, width=CONFIG.hidden_size).requires_grad_()
    cotangent = draw_hidden(2, length, width=CONFIG.hidden_size, seed=2)

    leaves = [x, *mixer.parameters()]
    results = []
    for out in (
        mixer(x, None, None)[0],
        torch.func.functional_call(module, weights, (x,)),
    ):
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    assert worst(*results) < 1e-11
