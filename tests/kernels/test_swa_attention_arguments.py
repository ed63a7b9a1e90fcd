"""What attention says to arguments that do not fit, and that strides change no result."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ttt_kernels import swa_attention, swa_attention_pair
from ttt_kernels.swa_attention.op import KnownAdjoints, SavedAttention, swa_attention_saved

B, T, HEADS, KV_HEADS, D, PAST, WINDOW = 2, 5, 4, 2, 6, 3, 4


def fitting(lead=()):
    """Tensors that fit, by name."""
    shapes = {
        "q": (*lead, B, T, HEADS, D),
        "k": (*lead, B, T, KV_HEADS, D),
        "v": (*lead, B, T, KV_HEADS, D),
        "past_k": (B, PAST, KV_HEADS, D),
        "past_v": (B, PAST, KV_HEADS, D),
    }
    return {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}


OPERATIONS = pytest.mark.parametrize(
    ("operation", "lead"),
    [(swa_attention, ()), (swa_attention_saved, ()), (swa_attention_pair, (2,))],
)
NAMES = pytest.mark.parametrize("name", ["q", "k", "v", "past_k", "past_v"])


@OPERATIONS
def test_dtypes(operation, lead):
    integers = {name: x.int() for name, x in fitting(lead).items()}
    with pytest.raises(TypeError, match=r"takes float64, .* not torch\.int32"):
        operation(**integers, window=WINDOW)


@OPERATIONS
@NAMES
def test_one_dtype_and_one_device(operation, lead, name):
    tensors = fitting(lead)
    with pytest.raises(TypeError, match="one dtype: q has"):
        operation(**{**tensors, name: tensors[name].float()}, window=WINDOW)
    with pytest.raises(ValueError, match=r"on one device: q is on (cpu|meta), \w+ on (cpu|meta)"):
        operation(**{**tensors, name: tensors[name].to("meta")}, window=WINDOW)
    with pytest.raises(TypeError, match=f"{name} must be a tensor, and is a list"):
        operation(**{**tensors, name: [1.0]}, window=WINDOW)


@OPERATIONS
@pytest.mark.parametrize(
    ("window", "error", "sentence"),
    [
        (0, ValueError, "window must be 1 or more.* is 0"),
        (-3, ValueError, "window must be 1 or more.* is -3"),
        (2.0, TypeError, r"window must be an integer or None, and is 2\.0"),
        (True, TypeError, "window must be an integer or None, and is True"),
    ],
)
def test_windows(operation, lead, window, error, sentence):
    with pytest.raises(error, match=sentence):
        operation(**fitting(lead), window=window)


@OPERATIONS
@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("q", (B, T, 3, D), r"2 heads must divide q's 3"),
        ("q", (B, T, HEADS, D + 1), "Head dims differ: q has 7, k and v have 6"),
        ("q", (B, T + 1, HEADS, D), "q has 2 sequences of 6 tokens, k and v have 2 of 5"),
        ("v", (B, T, KV_HEADS, D + 1), r"k and v differ in shape: .*2, 6\) and .*2, 7\)"),
        ("k", (T, KV_HEADS, D), r"k must have \d axes, and its shape is"),
    ],
)
def test_shapes(operation, lead, name, shape, sentence):
    tensors = fitting(lead)
    tensors[name] = tensors[name].new_zeros(*lead, *shape)
    with pytest.raises(ValueError, match=sentence):
        operation(**tensors, window=WINDOW)


@OPERATIONS
def test_caches(operation, lead):
    tensors = fitting(lead)
    with pytest.raises(ValueError, match="give both or neither"):
        operation(**{**tensors, "past_v": None}, window=WINDOW)
    past_v = tensors["q"].new_zeros(B, PAST, HEADS, D)
    with pytest.raises(ValueError, match=r"past_v must be \[2, P, 2, 6\].*\(2, 3, 4, 6\)"):
        operation(**{**tensors, "past_v": past_v}, window=WINDOW)
    with pytest.raises(ValueError, match="the same number of keys"):
        operation(**{**tensors, "past_v": tensors["past_v"][:, 1:]}, window=WINDOW)


def test_pairs():
    tensors = fitting((3,))
    with pytest.raises(ValueError, match="its length is 2"):
        swa_attention_pair(**tensors, window=WINDOW)
    tensors = fitting((2,))
    out = tensors["q"][0]
    lse = out.new_zeros(B, KV_HEADS, HEADS // KV_HEADS, T, 1)
    for saved, sentence in (
        (SavedAttention(out[:, 1:], lse), r"saved.out must be \[2, 5, 4, 6\].*\[2, 4, 4, 6\]"),
        (SavedAttention(out, lse[..., 0]), r"saved.lse must be \[2, 2, 2, 5, 1\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            swa_attention_pair(**tensors, window=WINDOW, saved=saved)
    known = KnownAdjoints(*(tensors[name][1] for name in ("q", "k", "q")))
    with pytest.raises(ValueError, match=r"known.v must be \[2, 5, 2, 6\].*\[2, 5, 4, 6\]"):
        swa_attention_pair(**tensors, window=WINDOW, known=known)


def test_head_dims_beyond_what_the_kernels_hold():
    # No CUDA device is needed to ask for one in a fake tensor.
    with FakeTensorMode():
        x = torch.empty(1, 4, 2, 257, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="On CUDA the head dim is at most 256, and is 257"):
            swa_attention(x, x, x, WINDOW)


def apart(x):
    """Equal values, no two of them neighbours in memory."""
    return x.new_zeros(*x.shape, 2).select(-1, 0).copy_(x)


@OPERATIONS
def test_strides_change_nothing(operation, lead):
    torch.manual_seed(3)
    tensors, found = fitting(lead), []
    for lay_out in (torch.clone, apart):
        laid = {name: lay_out(x).requires_grad_() for name, x in tensors.items()}
        out = operation(**laid, window=WINDOW)
        out = out[0] if isinstance(out, tuple) else out
        cotangent = torch.ones((), dtype=torch.float64).expand_as(out)
        found.append([out, *torch.autograd.grad(out, list(laid.values()), cotangent)])
    for plain, strided in zip(*found, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)
