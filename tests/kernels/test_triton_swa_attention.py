"""Attention's Triton kernels against the definition in float64: values, gradients, pairs."""

import pytest
import torch
from attention_cases import (
    CASES,
    Case,
    assert_near,
    draw,
    first_order,
    given,
    pair_of,
    reference_pair,
    second_order,
    use_small_tiles,
    wide,
)
from triton_runs import DEVICES, DTYPES

from ttt_kernels.swa_attention.op import swa_attention
from ttt_kernels.swa_attention.reference import swa_attention_reference
from ttt_kernels.triton_launch import suits_triton

# A case visits several tiles in half a second to five; these are the ones that the whole suite
# runs, all others are slow.
QUICK = {
    ("first order", "chunk over a cache", torch.float32),
    ("alone", "cache longer than the window", torch.float32),
    ("known", "leading tiles hidden from most", torch.bfloat16),
    ("second order", "one query", torch.float32),
}


def each_case(*kinds):
    """(kind, case, dtype) of every case in both precisions."""
    return pytest.mark.parametrize(
        ("kind", "case", "dtype"),
        [
            pytest.param(
                kind,
                case,
                dtype,
                marks=[] if (kind, name, dtype) in QUICK else pytest.mark.slow,
                id=f"{kind}-{name}-{str(dtype)[6:]}",
            )
            for kind in kinds
            for name, case in CASES.items()
            for dtype in DTYPES
        ],
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


@pytest.fixture(autouse=True)
def _tiles(request, monkeypatch):
    # On the device kernels run at the tiles they ship with.
    if request.node.get_closest_marker("interpreter"):
        use_small_tiles(monkeypatch)


def compare_first_order(tensors, window, dtype, cotangent=None, entries=1):
    assert suits_triton(*given(tensors))
    cotangent = torch.randn_like(tensors[0]) if cotangent is None else cotangent
    actual = first_order(swa_attention, tensors, window, cotangent)
    assert all(x.dtype == dtype for x in actual)
    expected = first_order(swa_attention_reference, wide(tensors), window, cotangent)
    assert_near(actual, expected, dtype, entries)


def compare_pair(kind, tensors, window, dtype, cotangent=None, entries=1):
    cotangent = torch.randn_like(tensors[0]) if cotangent is None else cotangent
    expected = first_order(reference_pair, wide(tensors), window, cotangent)
    actual = first_order(pair_of(kind, expected), tensors, window, cotangent)
    assert all(x.dtype == dtype for x in actual)
    assert_near(actual, expected, dtype, entries)


@pytest.mark.parametrize("device", DEVICES)
@each_case("first order")
def test_values_and_gradients(kind, case, dtype, device):
    compare_first_order(draw(case, dtype, device), case.window, dtype)


@pytest.mark.parametrize("device", DEVICES)
@each_case("alone", "saved", "known")
def test_pair_and_its_gradients(kind, case, dtype, device):
    # In bfloat16 the first chunk's worst entry is 1.5% of the largest off, and 0.7% by the norm.
    entries = 2 if dtype == torch.bfloat16 and case == CASES["first chunk"] else 1
    tensors = draw(case, dtype, device, pairs=True)
    compare_pair(kind, tensors, case.window, dtype, entries=entries)


@pytest.mark.parametrize("device", DEVICES)
@each_case("second order")
def test_gradient_of_the_gradient(kind, case, dtype, device):
    tensors = draw(case, dtype, device)
    cotangent = torch.randn_like(tensors[0])
    weights = [torch.randn_like(x) for x in given(tensors)]
    actual = second_order(swa_attention, tensors, case.window, cotangent, weights)
    arguments = (wide(tensors), case.window, cotangent, weights)
    assert_near(actual, second_order(swa_attention_reference, *arguments), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_gradient_of_the_gradient_without_the_caches(device):
    case = CASES["chunk over a cache"]
    tensors = draw(case, torch.float32, device)
    tensors[3:] = [x.detach() for x in tensors[3:]]
    q, k, v, *past = tensors
    leaves = [q, k, v]
    seed = torch.randn_like(q).requires_grad_()
    weights = [torch.randn_like(x) for x in leaves]
    results = []
    for function, inputs, extra in (
        (swa_attention, [seed, *leaves], past),
        (swa_attention_reference, wide([seed, *leaves]), wide(past)),
    ):
        out = function(*inputs[1:], case.window, *extra)
        grads = torch.autograd.grad(out, inputs[1:], inputs[0], create_graph=True)
        directions = [w.to(out.dtype) for w in weights]
        results.append(torch.autograd.grad(grads, inputs, directions))
    assert_near(*results, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_half_precision(device):
    case = CASES["several sequences, padded head dim"]
    compare_first_order(draw(case, torch.float16, device), case.window, torch.float16)
    pairs = draw(case, torch.float16, device, pairs=True)
    compare_pair("saved", pairs, case.window, torch.float16)


TILES = {
    "more queries than keys": (32, 16, 1),
    "more keys than queries": (16, 32, 1),
    "keys and values apart": (16, 16, 2),
}


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize(
    "tile",
    [
        pytest.param(t, marks=[] if t == "keys and values apart" else pytest.mark.slow)
        for t in TILES
    ],
)
def test_any_tile(tile, device, monkeypatch):
    use_small_tiles(monkeypatch, *TILES[tile])
    case = Case(1, 21, 1, 1, 16, 13, 12)
    if tile != "keys and values apart":
        tensors = draw(case, torch.float32, device)
        compare_first_order(tensors, case.window, torch.float32, entries=2)
    pairs = draw(case, torch.float32, device, pairs=True)
    compare_pair("alone", pairs, case.window, torch.float32, entries=2)


def inside_nan(x, after):
    """x's values as a view into a tensor that is NaN everywhere else."""
    shape = [n + (1 if axis == x.dim() - 2 else 0) for axis, n in enumerate(x.shape)]
    shape[-3] += 4
    shape[-1] += after
    around = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = around[..., 2:-2, 1:, : x.shape[-1]]
    return view.copy_(x)


LAYOUTS = {
    "inside a larger tensor": lambda x: inside_nan(x, 16 // x.element_size()),
    "at odd addresses": lambda x: inside_nan(x, 1),
    "last axis apart": lambda x: x.mT.contiguous().mT,
    "heads outermost": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
    "one token for all": lambda x: x[..., :1, :, :].expand_as(x),
    "one sequence for all": lambda x: x[..., :1, :, :, :].expand_as(x),
    "pairs innermost": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0),
}


def laid_out(tensors, layout):
    return [None if x is None else LAYOUTS[layout](x.detach()).requires_grad_() for x in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(
            layout,
            dtype,
            marks=[]
            if (layout, dtype) == ("at odd addresses", torch.bfloat16)
            else pytest.mark.slow,
        )
        for layout in LAYOUTS
        for dtype in DTYPES
    ],
)
def test_any_layout(layout, dtype, device):
    case = Case(2 if "sequence" in layout else 1, 17, 2, 1, 16, 9, 8)
    tensors = laid_out(draw(case, dtype, device), layout)
    cotangent = LAYOUTS[layout](torch.randn_like(tensors[0]))
    compare_first_order(tensors, case.window, dtype, cotangent)
    # Equal keys leave most gradients of a pair nothing but rounding.
    if dtype == torch.float32 and layout != "one token for all":
        pairs = laid_out(draw(case, dtype, device, pairs=True), layout)
        cotangent = LAYOUTS[layout](torch.randn_like(pairs[0]))
        compare_pair("saved", pairs, case.window, dtype, cotangent)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_attend(device):
    for b, length in ((0, 4), (1, 0)):
        case = Case(b, length, 2, 1, 16, 4, 3)
        tensors = draw(case, torch.float32, device)
        out, *grads = first_order(swa_attention, tensors, 4, torch.ones_like(tensors[0]))
        assert out.shape == (b, length, 2, 16)
        assert all(not x.any() for x in grads)
        pairs = draw(case, torch.float32, device, pairs=True)
        out, *grads = first_order(pair_of("alone", None), pairs, 4, torch.ones_like(pairs[0]))
        assert out.shape == (2, b, length, 2, 16)
        assert all(not x.any() for x in grads)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_of_any_size_stay_finite(device):
    case = Case(1, 17, 1, 1, 16, 8, None)
    tensors = draw(case, torch.float32, device)
    with torch.no_grad():
        tensors[0] *= 1000
    arguments = (case.window, torch.randn_like(tensors[0]))
    actual = first_order(swa_attention, tensors, *arguments)
    expected = first_order(swa_attention_reference, wide(tensors), *arguments)
    largest = max(float(e.abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=1e-2 * largest)
