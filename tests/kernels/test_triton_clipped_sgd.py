"""Clipped gradient descent as Triton kernels, against its float64 implementation."""

import pytest
import torch
from triton_runs import DEVICES, ON_CUDA, assert_near

from ttt_kernels import add_scaled_, scaled_differences, sequence_products
from ttt_kernels.clipped_sgd import triton_clipped_sgd
from ttt_kernels.triton_launch import suits_triton


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def alike(*shape, **k):
    return torch.randn(*shape, **k), torch.randn(*shape, **k)


def both_transposed(*shape, **k):
    return tuple(x.mT.contiguous().mT for x in alike(*shape, **k))


def one_transposed(*shape, **k):
    x, y = alike(*shape, **k)
    return x, y.mT.contiguous().mT


def cut_out(*shape, **k):
    b, rows, columns = shape
    x, y = alike(b, rows + 2, columns + 3, **k)
    return x[:, 1 : rows + 1, 2 : columns + 2], y[:, :rows, :columns]


def sequences_inside(*shape, **k):
    b, rows, columns = shape
    x, y = alike(rows, columns, b, **k)
    return x.movedim(-1, 0), y.movedim(-1, 0)


LAYOUTS = [alike, both_transposed, one_transposed, cut_out, sequences_inside]


def drawn(layout, batch, device):
    """Two lists: one tensor of many tiles and programs, a tiny one, one of an odd width."""
    shapes = [(batch, 65, 270), (batch, 1, 1), (batch, 33, 7)]
    pairs = [layout(*shape, device=device) for shape in shapes]
    return [x for x, _ in pairs], [y for _, y in pairs]


def doubles(tensors):
    return [x.double() for x in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products(layout, batch, device, monkeypatch):
    monkeypatch.setattr(triton_clipped_sgd, "STEPS", 2)
    monkeypatch.setattr(triton_clipped_sgd, "SUMS", 2)
    a, b = drawn(layout, batch, device)
    assert suits_triton(*a, *b)
    for x, y in ((a, b), (a, a)):
        actual, expected = sequence_products(x, y), sequence_products(doubles(x), doubles(y))
        # Products of two lists cancel: their error is that of the sizes.
        size = sequence_products(doubles(x), doubles(x))
        assert float(((actual - expected).abs() / size).max()) < 3e-7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_in_place(layout, sign, device):
    weights, gradient = drawn(layout, 3, device)
    rate = torch.tensor([0.3, 0.0, -2.0], device=device)
    expected = doubles(weights)
    add_scaled_(expected, doubles(gradient), rate.double(), sign)
    # What lies between the entries of a view must stay.
    bases = [w if w._base is None else w._base for w in weights]
    sums = [base.double().sum() - w.double().sum() for base, w in zip(bases, weights, strict=True)]
    places = [w.data_ptr() for w in weights]
    add_scaled_(weights, gradient, rate, sign)
    assert_near(weights, expected, torch.float32)
    assert places == [w.data_ptr() for w in weights]
    for base, w, rest in zip(bases, weights, sums, strict=True):
        torch.testing.assert_close(base.double().sum() - w.double().sum(), rest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_differences(layout, device):
    v, gradient = drawn(layout, 3, device)
    scales = torch.tensor([[0.3, 1.0, -2.0], [0.0, 0.5, 3.0]], device=device).unbind(0)
    before = [x.clone() for x in v]
    actual = scaled_differences(v, scales[0], gradient, scales[1])
    exact = scaled_differences(
        doubles(v), scales[0].double(), doubles(gradient), scales[1].double()
    )
    assert_near(actual, exact, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(v, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_gradients_of_float32_weights(device):
    weights, gradient = torch.randn(2, 5, 40, device=device), torch.randn(2, 5, 40, device=device)
    low, rate = gradient.bfloat16(), torch.tensor([0.25, 1.5], device=device)
    expected = weights.double() - rate.double()[:, None, None] * low.double()
    add_scaled_([weights], [low], rate, sign=-1)
    assert_near([weights], [expected], torch.float32)
    squares = low.double().square().sum((1, 2))
    assert_near([sequence_products([low], [low])], [squares], torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be_done_is_refused(device):
    weights, rate = [torch.zeros(2, 3, 4, device=device)], torch.ones(2, device=device)
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] and \[2, 4, 3\]"):
        sequence_products(weights, [torch.zeros(2, 4, 3, device=device)])
    with pytest.raises(ValueError, match=r"scale must be \[2\]"):
        add_scaled_(weights, weights, torch.ones(3, device=device))
    with pytest.raises(RuntimeError, match="at one place in memory"):
        add_scaled_([torch.zeros(1, 3, 4, device=device).expand(2, 3, 4)], weights, rate)
    with pytest.raises(ValueError, match="hold 1 and 0 tensors"):
        add_scaled_(weights, [], rate)


@pytest.mark.parametrize("device", [ON_CUDA])
def test_large_lists_agree_bit_for_bit_and_no_host_waits(device):
    shapes = [(3, 5632, 2560), (3, 2560, 5632)]
    a, b = ([torch.randn(*shape, device=device) for shape in shapes] for _ in range(2))
    sequence_products(a, b)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = sequence_products(a, b), sequence_products(a, b)
        add_scaled_(a, b, first.rsqrt().nan_to_num(), sign=-1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
