"""Whose kernels run the recurrences: the trial, and what a model is told."""

import pytest
import torch
from mixer_case import draw_hidden, mixer_of, worst

from ttt_megatron.baselines.fla_kernels import use_fla_kernels
from ttt_megatron.baselines.gated_delta_rule import gated_delta_rule
from ttt_megatron.baselines.kernel_trial import (
    KernelMissingError,
    try_delta_rule,
    try_state_space,
)
from ttt_megatron.baselines.state_space import state_space
from ttt_megatron.config.schema import ModelConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TRIALS = {
    "state space": (try_state_space, state_space),
    "delta rule": (try_delta_rule, gated_delta_rule),
}


def tried(name, function, dtype=torch.float32):
    TRIALS[name][0](function, 16, 8, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRIALS)
def test_a_right_one_passes_its_trial(name, dtype):
    tried(name, TRIALS[name][1], dtype)


def scaled_queries(function):
    return lambda q, *rest: function(q * 0.25, *rest)


def forgetting_the_state(function):
    return lambda *given: function(*given[:-1], None if given[-1] is None else given[-1] * 0)


def late_decay(function):
    """Decays that act a token later."""
    return lambda q, k, v, decay, *rest: function(q, k, v, decay.roll(1, 1), *rest)


def without_decay_gradient(function):
    return lambda q, k, v, decay, *rest: function(q, k, v, decay.detach() + 0 * decay, *rest)


def last_state_rounded_away(function):
    def wrong(*given):
        out, state = function(*given)
        return out, state * 1.05

    return wrong


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (scaled_queries, "has values .* off the definition's"),
        (forgetting_the_state, "has values .* off the definition's"),
        (late_decay, "has values .* off the definition's"),
        (without_decay_gradient, "has a gradient of argument 4 .* off the definition's"),
        (last_state_rounded_away, "has a state 5.* off the definition's"),
        (lambda function: lambda *given: function(*given[:-1]), "failed in a trial .TypeError"),
    ],
)
@pytest.mark.parametrize("name", TRIALS)
def test_a_wrong_one_is_refused(name, spoil, reason):
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(KernelMissingError, match=reason):
            tried(name, spoil(TRIALS[name][1]), dtype)


def test_without_cuda_the_plain_forms_run():
    mixers = [mixer_of("mamba2"), torch.nn.Identity(), mixer_of("gated_delta")]
    reason = "plain PyTorch (flash-linear-attention runs on CUDA alone, and this is cpu)"
    chosen = use_fla_kernels(mixers, CPU, torch.float32)
    assert chosen == {"Mamba2": reason, "GatedDeltaNet": reason}
    assert mixers[0].scan is state_space
    assert mixers[2].rule is gated_delta_rule


def test_float64_is_not_theirs():
    chosen = use_fla_kernels([mixer_of("mamba2")], CUDA, torch.float64)
    assert chosen == {"Mamba2": "plain PyTorch (flash-linear-attention knows no float64)"}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba2", "gated_delta"])
def test_on_a_gpu_the_kernels_are_found_and_right(kind):
    pytest.importorskip("fla")
    config = ModelConfig(hidden_size=256, num_heads=4)
    plain, fused = (mixer_of(kind, config, torch.float32).to(CUDA) for _ in range(2))
    chosen = use_fla_kernels([fused], CUDA, torch.bfloat16)
    assert list(chosen.values()) == ["flash-linear-attention"]
    x = draw_hidden(2, 300, width=256, dtype=torch.bfloat16).to(CUDA)
    results = []
    for mixer in (plain, fused):
        out, past = mixer(x[:, :170], None, None)
        later, _ = mixer(x[:, 170:], None, past)
        gradients = torch.autograd.grad(later.float().square().sum(), list(mixer.parameters()))
        results.append([t.double() for t in (out, later, *gradients)])
    assert worst(results[1], results[0]) < 5e-2
