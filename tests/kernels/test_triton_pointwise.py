"""RMSNorm, SwiGLU and RoPE as Triton kernels, against their float64 implementation."""

import pytest
import torch
from triton_runs import DEVICES, DTYPES, ON_CUDA, assert_near, wide

from ttt_kernels import rms_norm, rms_norm_pair, rope, rotations, swiglu, swiglu_pair
from ttt_kernels.triton_launch import suits_triton

EPS = 1e-2

OPERATIONS = {
    "rms_norm": lambda pair, gain: rms_norm(pair[0], gain, EPS),
    "rms_norm_pair": lambda pair, gain: rms_norm_pair(pair, gain, EPS),
    "swiglu": lambda pair, gain: swiglu(pair[0]) * gain[: pair.shape[-1] // 2],
    "swiglu_pair": lambda pair, gain: swiglu_pair(pair) * gain[: pair.shape[-1] // 2],
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def grads(function, arguments):
    """Value and gradients under a cotangent in the value's dtype that rounding leaves alone."""
    out = function(*arguments)
    cotangent = torch.arange(out.numel(), device=out.device).remainder(17).sub(8).view_as(out)
    return [out, *torch.autograd.grad(out, arguments, cotangent.to(out.dtype))]


def compare(name, pair, gain, dtype):
    """One operation on these tensors, as they are laid out."""
    assert suits_triton(pair)
    arguments = [pair.requires_grad_(), gain.requires_grad_()]
    actual = grads(OPERATIONS[name], arguments)
    assert actual[0].dtype == torch.promote_types(dtype, gain.dtype if "swi" in name else dtype)
    assert_near(actual, grads(OPERATIONS[name], wide(arguments)), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 14), (37, 64), (3, 1100)])
def test_values_and_gradients(name, rows, width, dtype, device):
    pair = torch.randn(2, 1, rows, width, device=device, dtype=dtype)
    compare(name, pair, torch.randn(width, device=device), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_gain_in_the_same_low_precision(name, device):
    pair = torch.randn(2, 5, 12, device=device, dtype=torch.bfloat16)
    compare(name, pair, torch.randn(12, device=device, dtype=torch.bfloat16), torch.bfloat16)


LAYOUTS = {
    "rows apart": lambda *shape, **k: torch.randn(*shape[:-1], 2 * shape[-1], **k)[
        ..., : shape[-1]
    ],
    "tokens apart": lambda *shape, **k: torch.randn(shape[0], 3, 9, shape[-1], **k)[:, :, 2:4],
    "columns apart": lambda *shape, **k: torch.randn(*shape[:-2], shape[-1], shape[-2], **k).mT,
    "one row for all": lambda *shape, **k: torch.randn(shape[-1], **k).expand(shape),
    "pairs innermost": lambda *shape, **k: torch.randn(*shape[1:], shape[0], **k).movedim(-1, 0),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_layout(name, layout, device):
    pair = LAYOUTS[layout](2, 3, 2, 12, device=device)
    compare(name, pair, torch.randn(12, device=device), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_cotangent_in_any_layout(device):
    pair, gain = torch.randn(2, 6, 10, device=device), torch.randn(10, device=device)
    cotangent = torch.randn(6, 10, 2, device=device).movedim(-1, 0)
    for function, width in ((lambda x, g: rms_norm_pair(x, g, EPS), 10), (swiglu_pair, 5)):
        inputs = [pair, gain] if width == 10 else [pair]
        results = []
        for arguments in ([x.requires_grad_() for x in inputs], wide(inputs)):
            out = function(*arguments)
            seed = cotangent[..., :width].to(out.dtype)
            results.append(torch.autograd.grad(out, arguments, seed))
        assert_near(*results, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_one_axis(device):
    empty = torch.randn(0, 6, device=device, requires_grad=True)
    gain = torch.randn(6, device=device, requires_grad=True)
    rms_norm(empty, gain, EPS).sum().backward()
    assert empty.grad.shape == (0, 6)
    assert torch.equal(gain.grad, torch.zeros_like(gain))
    assert swiglu(empty).shape == (0, 3)
    row = torch.randn(6, device=device)
    assert_near([rms_norm(row, gain, EPS)], [rms_norm(*wide([row, gain]), EPS)], torch.float32)
    assert_near([swiglu(row)], [swiglu(row.double())], torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_over_more_rows_than_programs(device, monkeypatch):
    from ttt_kernels.rms_norm import triton_rms_norm

    monkeypatch.setattr(triton_rms_norm, "_RANGES", 3)
    monkeypatch.setattr(triton_rms_norm, "_TILE", 32)
    pair = torch.randn(2, 25, 16, device=device)
    for name in ("rms_norm", "rms_norm_pair"):
        compare(name, pair.detach(), torch.randn(16, device=device), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_swiglu_far_from_zero(device):
    x = torch.tensor([[-200.0, -90.0, 90.0, 200.0, 1.0, 2.0, 3.0, 4.0]], device=device)
    arguments = [torch.stack((x, torch.ones_like(x)))]
    actual = grads(swiglu_pair, [a.requires_grad_() for a in arguments])
    assert all(bool(a.isfinite().all()) for a in actual)
    assert_near(actual, grads(swiglu_pair, wide(arguments)), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lead", "heads", "width"), [((), 1, 2), ((3,), 2, 12), ((2, 2), 5, 64), ((1,), 3, 80)]
)
def test_rope_and_back(lead, heads, width, dtype, device):
    whole = torch.randn(*lead, 7, heads + 2, width, device=device, dtype=dtype)
    x = whole[..., 1:-1, :].requires_grad_()
    assert suits_triton(x)
    turns = [rotations(100, 7, width, 500.0, like) for like in (x, x.double())]
    actual = grads(lambda y: rope(y, turns[0]), [x])
    assert_near(actual, grads(lambda y: rope(y, turns[1]), wide([x])), dtype)
    conjugate = rope(x.mT.contiguous().mT, turns[0].conj())
    assert_near([conjugate], [rope(x.double(), turns[1].conj())], dtype)


@pytest.mark.parametrize("device", [ON_CUDA])
@pytest.mark.parametrize("name", OPERATIONS)
def test_two_runs_agree_bit_for_bit(name, device):
    pair = torch.randn(2, 8, 1024, 2560, device=device, dtype=torch.bfloat16, requires_grad=True)
    gain = torch.randn(2560, device=device, requires_grad=True)
    first, second = (grads(OPERATIONS[name], [pair, gain]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    compare(name, pair.detach(), gain.detach(), torch.bfloat16)
