"""The whole engine through Triton's kernels in float32, against the float64 one, without any."""

import importlib
import pkgutil
from collections import Counter

import pytest
import torch
from meta_case import batch, engine_gradients, learner, worst_error
from triton_runs import DEVICES

import ttt_kernels
from ttt_kernels.triton_launch import launch
from ttt_megatron.serving.session import Session

MODEL = {"num_layers": 3}
INNER = {"lr": 0.2}
BOUND = 5e-5
"""Of float32 gradients; all second-order terms together are held to be 100 times as much."""

READING = {
    "clipped_sgd.combine_kernel",
    "clipped_sgd.products_kernel",
    "clipped_sgd.sums_kernel",
    "linear_cross_entropy.read_kernel",
    "rms_norm.backward_kernel",
    "rms_norm.forward_kernel",
    "rope.rotate_kernel",
    "swa_attention.dkv_kernel",
    "swa_attention.dq_kernel",
    "swa_attention.forward_kernel",
    "swiglu.backward_kernel",
    "swiglu.forward_kernel",
}
"""Kernels of reading with inner steps."""

TRAINING = READING | {
    "linear_cross_entropy.gradient_kernel",
    "rms_norm.pair_backward_kernel",
    "rms_norm.pair_forward_kernel",
    "swa_attention.pair_dkv_kernel",
    "swa_attention.pair_dq_kernel",
    "swa_attention.pair_forward_kernel",
    "swiglu.pair_backward_kernel",
    "swiglu.pair_forward_kernel",
}


@pytest.fixture
def launched(monkeypatch):
    """Counts the kernels that run, by module and name."""
    found = Counter()

    def counting(kernel, grid, *arguments, **constants):
        operation = kernel.fn.__module__.split(".")[1]
        found[f"{operation}.{kernel.fn.__name__}"] += 1
        return launch(kernel, grid, *arguments, **constants)

    # All of them first, lest one that is imported later gets hold of the counter for good.
    names = [m.name for m in pkgutil.walk_packages(ttt_kernels.__path__, "ttt_kernels.")]
    for module in map(importlib.import_module, names):
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", counting)
    return found


def small_learner(dtype=torch.float64, device="cpu", **inner):
    """Three blocks, of which two have fast weights."""
    return learner(MODEL, INNER | inner, dtype=dtype).to(device)


def on(device, tensors):
    return tuple(x.to(device) for x in tensors)


def wide(gradients):
    return {name: g.cpu().double() for name, g in gradients.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["recompute", "save_activations", "save_all"])
def test_meta_gradients(policy, device, launched):
    data = batch(length=12, size=1)
    exact = engine_gradients(small_learner(), data)
    first_order = engine_gradients(small_learner(mode="first_order"), data)
    assert worst_error(first_order, exact) > 100 * BOUND
    assert not launched
    model = small_learner(torch.float32, device, memory_policy=policy)
    found = engine_gradients(model, on(device, data))
    assert worst_error(wide(found), exact) < BOUND
    assert set(launched) == TRAINING


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_and_decoding(device, launched):
    tokens, targets, _ = batch(length=12, size=1)
    mask = torch.ones_like(targets, dtype=torch.bool)
    whole = {"logits_of": (0, 1, 2)}
    exact = small_learner()(tokens, targets, mask, **whole)
    assert not launched
    model = small_learner(torch.float32, device)
    found = model(*on(device, (tokens, targets, mask)), **whole)
    torch.testing.assert_close(found.token_nll.cpu().double(), exact.token_nll, rtol=0, atol=BOUND)
    assert set(launched) == READING

    launched.clear()
    session = Session(model, batch=1)
    pieces = [session.read(x.to(device)) for x in tokens.split((9, 1, 2), dim=1)]
    logits = torch.cat(pieces, dim=1).cpu().double()
    expected = torch.cat([exact.logits[i] for i in range(3)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=10 * BOUND)
    assert set(launched) == READING
