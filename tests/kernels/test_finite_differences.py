"""Gradients of definitions, twice, and of operations, once, against finite differences.

The head forms its gradients with its loss, for one backward pass: `test_linear` holds it against
the definition.
"""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ttt_kernels import (
    fast_linear,
    fast_linear_pair,
    linear,
    linear_pair,
    rms_norm,
    rms_norm_pair,
    rope,
    rotations,
    swiglu,
    swiglu_pair,
)
from ttt_kernels.clipped_sgd.reference import (
    add_scaled_reference_,
    scaled_differences_reference,
    sequence_products_reference,
)
from ttt_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from ttt_kernels.rms_norm.reference import rms_norm_reference
from ttt_kernels.rope.reference import rope_reference
from ttt_kernels.swiglu.reference import swiglu_reference

EPS = 1e-2
TARGETS = torch.tensor([[3, 0, 4]])
LOSS_WEIGHTS = torch.tensor([[1.5, 0.0, -0.5]]).double()
ROTATION = rotations(100, 3, 4, 50.0, torch.zeros(1).double())


def leaves(*shapes):
    torch.manual_seed(7)
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


# Each: a function of tensors, and their shapes. Sequences in twos, a token's axis of 3.
DEFINITIONS = {
    "rms_norm": (lambda x, g: rms_norm_reference(x, g, EPS), [(2, 5), (5,)]),
    "swiglu": (swiglu_reference, [(2, 6)]),
    "rope": (lambda x: rope_reference(x, ROTATION), [(1, 3, 2, 4)]),
    "linear_cross_entropy": (
        lambda h, w: linear_cross_entropy_reference(h, w, TARGETS, LOSS_WEIGHTS),
        [(1, 3, 4), (5, 4)],
    ),
    "sequence_products": (
        lambda a, b, c, d: sequence_products_reference([a, b], [c, d]),
        [(2, 2, 3), (2, 3, 1), (2, 2, 3), (2, 3, 1)],
    ),
    "scaled_differences": (
        lambda a, s, b, t: tuple(scaled_differences_reference([a], s, [b], t)),
        [(2, 2, 3), (2,), (2, 2, 3), (2,)],
    ),
}

OPERATIONS = {
    "rms_norm": (lambda x, g: rms_norm(x, g, EPS), [(2, 5), (5,)]),
    "rms_norm_pair": (lambda x, g: rms_norm_pair(x, g, EPS), [(2, 2, 5), (5,)]),
    "swiglu": (swiglu, [(2, 6)]),
    "swiglu_pair": (swiglu_pair, [(2, 2, 6)]),
    "rope": (lambda x: rope(x, ROTATION), [(1, 3, 2, 4)]),
    "linear": (linear, [(2, 3, 4), (5, 4)]),
    "linear_pair": (linear_pair, [(2, 3, 4), (5, 4)]),
    "fast_linear": (fast_linear, [(2, 3, 4), (2, 5, 4)]),
    "fast_linear_shared": (fast_linear, [(2, 3, 4), (5, 4)]),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_are_twice_differentiable(name):
    function, shapes = DEFINITIONS[name]
    arguments = leaves(*shapes)
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("name", OPERATIONS)
def test_closed_form_gradients(name):
    function, shapes = OPERATIONS[name]
    assert gradcheck(function, leaves(*shapes))


def test_fast_linear_pair_with_its_direction_held():
    x, weight, direction = leaves((2, 2, 3, 4), (2, 5, 4), (2, 5, 4))
    held = direction.detach()
    assert gradcheck(lambda *a: fast_linear_pair(*a, held), (x, weight))


def test_the_definition_of_a_step_in_place_is_twice_differentiable():
    def stepped(total, term, scale):
        moved = total.clone()
        add_scaled_reference_([moved], [term], scale, sign=-1)
        return moved

    arguments = leaves((2, 2, 3), (2, 2, 3), (2,))
    assert gradcheck(stepped, arguments)
    assert gradgradcheck(stepped, arguments)
