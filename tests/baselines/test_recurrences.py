"""Both recurrences: chunked forms against their definitions, values and gradients."""

from functools import partial

import pytest
import torch
from mixer_case import worst
from torch.autograd import gradcheck

from ttt_megatron.baselines.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference
from ttt_megatron.baselines.state_space import state_space, state_space_reference

FORMS = {
    "state space": (state_space, state_space_reference),
    "delta rule": (gated_delta_rule, gated_delta_rule_reference),
}


def arguments(name, length, *, past, batch=2, heads=3, rows=5, columns=4, scale=2.0):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (batch, length)
    decay = -scale * torch.rand((*tokens, heads), generator=generator, dtype=torch.float64) ** 2
    state = normal(batch, heads, rows, columns) if past else None
    if name == "state space":
        given = [normal(*tokens, rows), normal(*tokens, rows), normal(*tokens, heads, columns)]
        given.append(decay)
    else:
        keys = torch.nn.functional.normalize(normal(*tokens, heads, rows), dim=-1)
        given = [normal(*tokens, heads, rows), keys, normal(*tokens, heads, columns), decay]
        given.append(torch.rand((*tokens, heads), generator=generator, dtype=torch.float64))
    return [x if x is None else x.requires_grad_() for x in (*given, state)]


def values_and_gradients(function, given):
    results = function(*given)
    generator = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    leaves = [x for x in given if x is not None]
    return [*results, *torch.autograd.grad(results, leaves, cotangents, allow_unused=True)]


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 27])
@pytest.mark.parametrize("name", FORMS)
def test_the_chunked_form_equals_the_definition(name, length, past):
    chunked, definition = FORMS[name]
    given = arguments(name, length, past=past)
    found = values_and_gradients(partial(chunked, chunk_size=8), given)
    assert worst(found, values_and_gradients(definition, given)) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_the_chunk_of_every_day_equals_the_definition(name):
    chunked, definition = FORMS[name]
    given = arguments(name, 150, past=True)
    found = values_and_gradients(chunked, given)
    assert worst(found, values_and_gradients(definition, given)) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_what_forgets_at_once_overflows_nowhere(name):
    """Decays of exp(−300) a token, in float32, whose inverse is no number."""
    chunked, definition = FORMS[name]
    exact = arguments(name, 40, past=True, scale=600.0)
    given = [x.detach().float().requires_grad_() for x in exact]
    found = [x.double() for x in values_and_gradients(chunked, given)]
    assert worst(found, values_and_gradients(definition, exact)) < 1e-3


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_finite_differences(name):
    chunked = partial(FORMS[name][0], chunk_size=3)
    given = arguments(name, 5, past=True, batch=1, heads=2, rows=3, columns=2)
    assert gradcheck(chunked, given, eps=1e-6, atol=1e-7, rtol=1e-6)
