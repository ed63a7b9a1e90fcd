"""What operations say to arguments that do not fit, and that strides change no result."""

import pytest
import torch

from ttt_kernels import (
    CurrentScaling,
    add_scaled_,
    clip_factor,
    fast_linear,
    fast_linear_pair,
    fp8_linear,
    fp8_linear_pair,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_pair,
    linear_pair,
    rms_norm,
    rms_norm_pair,
    rope,
    rotations,
    scaled_differences,
    sequence_products,
    swiglu,
    swiglu_pair,
)

B, T, WIDTH, OUT, VOCABULARY = 2, 5, 6, 4, 7


def floats(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


def turns(tokens=T, width=WIDTH):
    return rotations(3, tokens, width, 100.0, floats(1))


def targets():
    return torch.randint(VOCABULARY, (B, T))


# Arguments that fit, by operation. The first is the one made wrong in dtype and device.
FITTING = {
    linear: lambda: (floats(B, T, WIDTH), floats(OUT, WIDTH)),
    linear_pair: lambda: (
        floats(2, B, T, WIDTH), floats(OUT, WIDTH), floats(B, T, OUT), floats(B, T, WIDTH)
    ),
    fast_linear: lambda: (floats(B, T, WIDTH), floats(B, OUT, WIDTH)),
    fast_linear_pair: lambda: (
        floats(2, B, T, WIDTH), floats(B, OUT, WIDTH), floats(B, OUT, WIDTH),
        floats(B, T, OUT), floats(B, T, WIDTH),
    ),
    fp8_linear: lambda: (floats(B, 16, 32), floats(16, 32), CurrentScaling()),
    fp8_linear_pair: lambda: (floats(2, B, 16, 32), floats(16, 32), CurrentScaling()),
    rms_norm: lambda: (floats(B, T, WIDTH), floats(WIDTH), 1e-2),
    rms_norm_pair: lambda: (floats(2, B, T, WIDTH), floats(WIDTH), 1e-2),
    swiglu: lambda: (floats(B, T, WIDTH),),
    swiglu_pair: lambda: (floats(2, B, T, WIDTH),),
    rope: lambda: (floats(B, T, 3, WIDTH), turns()),
    linear_cross_entropy: lambda: (
        floats(B, T, WIDTH), floats(VOCABULARY, WIDTH), targets(), floats(B, T)
    ),
    linear_cross_entropy_pair: lambda: (
        floats(2, B, T, WIDTH), floats(VOCABULARY, WIDTH), targets(),
        floats(B, T), floats(B, T), floats(B, T, WIDTH),
    ),
    sequence_products: lambda: ([floats(B, OUT, WIDTH)], [floats(B, OUT, WIDTH)]),
    add_scaled_: lambda: ([floats(B, OUT, WIDTH)], [floats(B, OUT, WIDTH)], floats(B)),
    scaled_differences: lambda: (
        [floats(B, OUT, WIDTH)], floats(B), [floats(B, OUT, WIDTH)], floats(B)
    ),
}  # fmt: skip
OPERATIONS = pytest.mark.parametrize("operation", FITTING, ids=lambda f: f.__name__)


def changed(x, change):
    """The tensor, or the tensor within the list, changed."""
    return [change(x[0])] if isinstance(x, list) else change(x)


@OPERATIONS
def test_integers_are_refused(operation):
    first, *rest = FITTING[operation]()
    with pytest.raises(TypeError, match=r"must be float64, float32, .* is torch\.int32"):
        operation(changed(first, lambda x: x.int()), *rest)


@OPERATIONS
def test_two_devices_are_refused(operation):
    arguments = FITTING[operation]()
    tensors = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor | list)]
    for index in tensors if len(tensors) > 1 else []:
        moved = list(arguments)
        moved[index] = changed(moved[index], lambda x: x.to("meta"))
        with pytest.raises(ValueError, match=r"on one device: .* on (cpu|meta), .* on (cpu|meta)"):
            operation(*moved)


@OPERATIONS
def test_what_is_no_tensor_is_refused(operation):
    first, *rest = FITTING[operation]()
    with pytest.raises(TypeError, match="must be a tensor, and is a float"):
        operation([1.0] if isinstance(first, list) else 1.0, *rest)


def shaped(operation, index, *shape):
    """The operation's fitting arguments but for the shape of one."""
    arguments = list(FITTING[operation]())
    arguments[index] = changed(arguments[index], lambda x: x.new_zeros(shape))
    return arguments


WRONG_SHAPES = [
    (linear, 1, (OUT, WIDTH + 1), r"weight must be \[out, 6\].*\[4, 7\]"),
    (linear_pair, 0, (3, B, T, WIDTH), "length is 2, not 3"),
    (linear_pair, 0, (2, WIDTH), r"pair must be \[2, ..., tokens, in\].*\[2, 6\]"),
    (linear_pair, 2, (B, T, OUT + 1), r"primal must be \[2, 5, 4\].*\[2, 5, 5\]"),
    (linear_pair, 3, (B, T, OUT), r"dot_adjoint must be \[2, 5, 6\].*\[2, 5, 4\]"),
    (fast_linear, 1, (B + 1, OUT, WIDTH), r"weight \[b, out, in\].*\[2, 5, 6\] and \[3, 4, 6\]"),
    (fast_linear, 0, (T, WIDTH), r"x must be \[b, T, in\]"),
    (fast_linear_pair, 0, (3, B, T, WIDTH), "length is 2, not 3"),
    (fast_linear_pair, 2, (B, WIDTH, OUT), r"direction must be \[2, 4, 6\].*\[2, 6, 4\]"),
    (fast_linear_pair, 3, (B, T, WIDTH), r"primal must be \[2, 5, 4\]"),
    (fast_linear_pair, 4, (B, T, OUT), r"dot_adjoint must be \[2, 5, 6\]"),
    (fp8_linear, 0, (B, 16), "last axis is 16 long.*takes 32"),
    (fp8_linear, 1, (32,), r"weight must be \[out, in\]"),
    (fp8_linear_pair, 0, (3, B, 16, 32), "length is 2, not 3"),
    (rms_norm, 1, (WIDTH + 1,), r"gain must be \[6\].*\[7\]"),
    (rms_norm, 0, (), r"x must be \[..., H\]"),
    (rms_norm_pair, 0, (B + 1, T, WIDTH), "length is 2, not 3"),
    (rms_norm_pair, 1, (1,), r"gain must be \[6\].*\[1\]"),
    (swiglu, 0, (B, 7), "length 7 is odd"),
    (swiglu_pair, 0, (2, 3, 7), "length 7 is odd"),
    (swiglu_pair, 0, (4, 6), "length is 2, not 4"),
    (rope, 0, (B, T + 1, 3, WIDTH), r"rotation \[6, 3\].*\[5, 3\]"),
    (rope, 0, (B, T, 3, 5), "even head dim"),
    (rope, 0, (T, WIDTH), r"x must be \[..., T, n, d\]"),
    (linear_cross_entropy, 0, (WIDTH,), r"hidden must be \[..., tokens, H\]"),
    (linear_cross_entropy, 1, (VOCABULARY, 5), r"weight must be \[V, 6\].*\[7, 5\]"),
    (linear_cross_entropy, 2, (B, T + 1), r"targets must be \[2, 5\].*\[2, 6\]"),
    (linear_cross_entropy, 3, (B,), r"token_weights must be \[2, 5\].*\[2\]"),
    (linear_cross_entropy_pair, 0, (3, B, T, WIDTH), "length is 2, not 3"),
    (linear_cross_entropy_pair, 4, (T, B), r"derivative_weights must be \[2, 5\]"),
    (linear_cross_entropy_pair, 5, (B, T), r"dot_adjoint must be \[2, 5, 6\]"),
    (sequence_products, 1, (B, WIDTH, OUT), r"\[2, 4, 6\] and \[2, 6, 4\]"),
    (sequence_products, 0, (OUT, WIDTH), r"must be \[b, out, in\]"),
    (add_scaled_, 2, (B + 1,), r"scale must be \[2\].*\[3\]"),
    (scaled_differences, 1, (B, 1), r"scale_a must be \[2\].*\[2, 1\]"),
]


@pytest.mark.parametrize(
    ("operation", "index", "shape", "sentence"),
    WRONG_SHAPES,
    ids=[f"{f.__name__}-{i}-{list(s)}" for f, i, s, _ in WRONG_SHAPES],
)
def test_shapes_that_do_not_fit_are_refused(operation, index, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        operation(*shaped(operation, index, *shape))


def test_values_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="clip must be a largest norm, or 0 for none, and is -1"):
        clip_factor(floats(B), -1.0)
    with pytest.raises(ValueError, match="sign must be 1 or -1, and is 2"):
        add_scaled_(*FITTING[add_scaled_](), sign=2)
    with pytest.raises(ValueError, match=r"head_dim must be even .* is 5"):
        turns(width=5)
    with pytest.raises(TypeError, match=r"rotation must be complex, and is torch\.float64"):
        rope(floats(B, T, 3, WIDTH), floats(T, 3))
    with pytest.raises(ValueError, match="of one length, at least 1, and hold 0 and 0"):
        sequence_products([], [])
    for operation in (linear_cross_entropy, linear_cross_entropy_pair):
        arguments = list(FITTING[operation]())
        arguments[2] = arguments[2].int()
        with pytest.raises(TypeError, match=r"targets must be int64, and are torch\.int32"):
            operation(*arguments)
        for target in (-1, VOCABULARY):
            arguments[2] = torch.full((B, T), target)
            with pytest.raises(ValueError, match=f"Target {target} is outside the vocabulary of 7"):
                operation(*arguments)


def apart(x):
    """Equal values, no two of them neighbours in memory."""
    return x.new_zeros(*x.shape, 2).select(-1, 0).copy_(x)


@OPERATIONS
def test_strides_change_nothing(operation):
    torch.manual_seed(3)
    arguments = FITTING[operation]()
    gained = []
    for lay_out in (torch.clone, apart):
        laid = [changed(x, lay_out) if isinstance(x, torch.Tensor | list) else x for x in arguments]
        leaves = [
            x.requires_grad_()
            for x in laid[:2]
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]
        found = operation(*laid)
        found = laid[0] if found is None else found
        outputs = list(found) if isinstance(found, tuple | list) else [found]
        # A cotangent whose own strides are 0.
        seeded = [torch.ones(()).double().expand_as(outputs[0])] if leaves else []
        gained.append(
            [
                *(x.detach() for x in outputs),
                *(torch.autograd.grad(outputs[:1], leaves, seeded) if leaves else ()),
            ]
        )
    for plain, strided in zip(*gained, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)
