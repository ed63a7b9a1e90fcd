"""Slow weights are rounded to bfloat16 once a pass, to the same numbers as in every product."""

from unittest.mock import patch

import pytest
import torch
from meta_case import batch, learner
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_kernels import RoundedWeights
from ttt_megatron.meta.chunk_graph import ChunkPrograms
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.meta_loss import MetaRun
from ttt_megatron.serving.session import Session

SETTINGS = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}
INNER = {"lr": 0.05}


def low(model: dict | None = None, **inner) -> Learner:
    return learner(model, INNER | inner, **SETTINGS)


def rounding_nothing(one: Learner) -> Learner:
    """Every product of it rounds its weights."""
    one.rounded.renew = lambda *_: None
    return one


def losses_and_gradients(one: Learner, steps: int = 2) -> list[torch.Tensor]:
    """Two micro-batches under way at once, and steps that change the weights."""
    found = []
    for step in range(steps):
        pair = [one(*batch(seed=2 * step + i)).loss for i in (0, 1)]
        sum(pair).backward()
        for parameter in one.parameters():
            found.append(parameter.grad)
            parameter.data.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
        found += pair
    return found


@pytest.mark.parametrize("shape", [None, {"tie_embeddings": False}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("policy", ["recompute", "save_all"])
def test_gradients_are_those_of_rounding_in_every_product(policy, shape):
    actual = losses_and_gradients(low(shape, memory_policy=policy))
    expected = losses_and_gradients(rounding_nothing(low(shape, memory_policy=policy)))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("policy", ["recompute", "save_all"])
def test_programs_read_the_renewed_copies(policy):
    one, direct = low(memory_policy=policy), low(memory_policy=policy)
    one.runner = ChunkPrograms()
    found, expected = ([], [])
    for seen, which in ((found, one), (expected, direct)):
        for step in range(3):
            loss = which(*batch(seed=step)).loss
            loss.backward()
            seen.append(loss.detach())
            for parameter in which.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.3)
                parameter.grad = None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert abs(float(expected[2] - expected[0])) > 0.05


def test_training_without_inner_steps_keeps_no_copies():
    one = low(mode="off")
    one(*batch()).loss.backward()
    assert one.rounded.nbytes == 0


class Casts(TorchDispatchMode):
    """Counts conversions of tensors of these shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.found = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.found += tuple(args[0].shape) in self.shapes
        return function(*args, **(kwargs or {}))


def test_no_sweep_rounds_a_slow_matrix_again():
    one = low(memory_policy="save_all")
    shapes = {tuple(w.shape) for w in one._static_matrices()}
    fast = {tuple(w.shape) for mlp in one.model.initial_fast_weights() for w in mlp}
    casts = Casts(shapes - fast)

    def counted(method):
        def run(*args):
            with casts:
                return method(*args)

        return run

    # The last chunk's weights go through autograd and are rounded for it.
    for size in (24, 48):
        casts.found = 0
        with (
            patch.object(MetaRun, "forward", counted(MetaRun.forward)),
            patch.object(MetaRun, "backward", counted(MetaRun.backward)),
        ):
            one(*batch(size)).loss.backward()
        assert casts.found <= len(one._static_matrices())


def read(session: Session, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits of reading in odd pieces; a clone reads a part of them again."""
    logits = [session.read(x) for x in tokens.split((5, 1, 1, 6, 2), dim=1)]
    twin = session.clone()
    logits += [twin.read(tokens[:, :3]), session.read(tokens[:, 3:8]), twin.next_logits]
    return logits


@pytest.mark.parametrize("inner_steps", [True, False])
def test_sessions_read_the_same(inner_steps):
    tokens = batch(15)[0]
    actual = read(Session(low(), len(tokens), inner_steps), tokens)
    with patch.object(RoundedWeights, "renew", lambda *_: None):
        expected = read(Session(low(), len(tokens), inner_steps), tokens)
    assert all(map(torch.equal, actual, expected))


def test_a_session_keeps_every_matrix_rounded_once():
    one = low()
    Session(one, 2)
    matrices = sum(p.numel() for p in one.parameters() if p.dim() == 2)
    fast = sum(w.numel() for mlp in one.model.initial_fast_weights() for w in mlp)
    assert one.rounded.nbytes == 2 * (matrices - fast)
    Session(one, 2, inner_steps=False)
    assert one.rounded.nbytes == 2 * matrices


def test_weights_that_change_under_a_session_are_refused():
    one = low()
    session = Session(one, 1)
    session.read(torch.tensor([[1, 2]]))
    with torch.no_grad():
        one.model.head_weight.mul_(2)
    with pytest.raises(RuntimeError, match="was changed after it was rounded"):
        session.read(torch.tensor([[3]]))
