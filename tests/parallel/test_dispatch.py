"""Whatever multiplies, attends, normalises or takes a softmax goes through `ttt_kernels`.

Training, evaluation and decoding, with plain layers and with megatron-core's, so that a kernel that
replaces an operation replaces it everywhere.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ttt_kernels
from ttt_megatron.config import InnerConfig, ModelConfig, ParallelConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import process_groups
from ttt_megatron.parallel.replica import transformer_config
from ttt_megatron.parallel.tensor_layers import ColumnLinear, tensor_parallel_slots
from ttt_megatron.serving.session import Session

KERNELS = Path(ttt_kernels.__file__).parent
MODEL = ModelConfig(
    vocab_size=19,
    num_layers=3,
    num_suffix_layers=2,
    hidden_size=16,
    num_heads=2,
    ffn_hidden_size=12,
    window_size=7,
)
INNER = InnerConfig(chunk_size=4, memory_policy="save_all")
OPERATIONS = {
    "clipped_sgd",
    "fast_linear",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "swa_attention",
    "swiglu",
}
OF_KERNELS = (
    "softmax",
    "scaled_dot_product",
    "attention",
    "layer_norm",
    "rms_norm",
    "nll_loss",
    "silu",
    "glu",
    "sigmoid",
    "logsumexp",
    "rsqrt",
)
"""Parts of the names of what torch's own norms, softmaxes and gates run as, backwards too."""
PRODUCTS = {
    F.linear,
    F.scaled_dot_product_attention,
    F.cross_entropy,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
}
"""Their backward passes are run by autograd, which no caller can be told of."""


def _operation() -> str | None:
    """The folder of `ttt_kernels` that a call comes from, if any."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(KERNELS):
            return path.relative_to(KERNELS).parts[0]
        frame = frame.f_back
    return None


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        operation = _operation()
        if operation is None:
            name = function.name()
            assert not any(part in name for part in OF_KERNELS), f"{name} outside ttt_kernels"
        else:
            self.seen.add(operation)
        return function(*args, **(kwargs or {}))


class _Products(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        outside = function in PRODUCTS and _operation() is None
        assert not outside, f"{function} outside ttt_kernels"
        return function(*args, **(kwargs or {}))


def _batch() -> tuple[torch.Tensor, ...]:
    rows = torch.randint(19, (2, 13))
    return rows[:, :-1], rows[:, 1:], torch.ones(2, 12, dtype=torch.bool)


def _train(learner: Learner) -> None:
    learner(*_batch()).loss.backward()


@torch.no_grad()
def _evaluate(learner: Learner) -> None:
    learner(*_batch(), logits_of=(0, 2))


def _decode(learner: Learner) -> None:
    session = Session(learner, batch=2)
    tokens, _, _ = _batch()
    session.prefill(tokens[:, :9])
    session.read(tokens[:, 9:])


@pytest.mark.parametrize("use", [_train, _evaluate, _decode])
@pytest.mark.parametrize("layers", ["plain", "megatron"])
def test_all_maths_goes_through_the_kernels(use, layers):
    with process_groups():
        slots = None
        if layers == "megatron":
            slots = tensor_parallel_slots(transformer_config(MODEL, ParallelConfig()), 19)
        learner = Learner(MODEL, INNER, slots=slots)
        assert (layers == "megatron") == any(isinstance(m, ColumnLinear) for m in learner.modules())
        with _Products(), _Watch() as watch:
            use(learner)
    assert watch.seen >= OPERATIONS


@pytest.mark.parametrize(
    "outside",
    [
        lambda x: F.linear(x, x),
        lambda x: x @ x,
        lambda x: x.softmax(-1),
        lambda x: F.rms_norm(x, (3,)),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        F.silu,
    ],
)
def test_what_goes_another_way_is_noticed(outside):
    with pytest.raises(AssertionError, match="outside ttt_kernels"), _Products(), _Watch():
        outside(torch.ones(3, 3))


def test_the_backend_is_told_with_its_reason():
    assert str(ttt_kernels.backend("cpu")) in (
        "torch (Triton kernels run on CUDA, not on cpu)",
        "torch (Triton is not installed)",
    )
    assert str(ttt_kernels.backend("cpu", torch.float64)) == "torch (float64 has no Triton kernels)"
    with ttt_kernels.plain_definitions():
        assert ttt_kernels.backend().name == "reference"
