"""Within a sequence the host never waits for the device: no value of a tensor decides anything.

On a CPU nothing waits, so what would make it wait on a GPU is looked for: operations whose result
the host reads or whose shape depends on values, and tensors made from the host's numbers.
"""

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from meta_case import batch, learner
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_megatron.meta.chunk_graph import ChunkPrograms
from ttt_megatron.meta.meta_loss import MetaRun
from ttt_megatron.serving.session import Session

READS_VALUES = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::item",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::argwhere",
    "aten::masked_select",
    "aten::index.Tensor",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::histc",
    "aten::repeat_interleave.Tensor",
    "aten::segment_reduce",
}
"""`index` with a mask looks for its true entries; with positions it would do no harm."""
FROM_THE_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)
TO_THE_HOST = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "numpy")


def _in_a_check() -> bool:
    """Arguments are checked by value on the CPU alone, where nothing waits."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_check":
        frame = frame.f_back
    return frame is not None


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        waits = function.name() in READS_VALUES and not _in_a_check()
        assert not waits, f"{function.name()} makes the host wait"
        return function(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        assert function not in FROM_THE_HOST, f"{function} copies from the host"
        return function(*args, **(kwargs or {}))


class NoWaiting(ExitStack):
    """Within, whatever would make the host wait for a device is an error."""

    def __enter__(self):
        super().__enter__()
        for name in TO_THE_HOST:
            self.enter_context(patch.object(torch.Tensor, name, _refused(name)))
        self.enter_context(_Functions())
        self.enter_context(_Operations())
        return self


def _refused(name: str) -> Any:
    original = getattr(torch.Tensor, name)

    def read(*args: Any, **settings: Any) -> Any:
        assert _in_a_check(), f"Tensor.{name} makes the host wait"
        return original(*args, **settings)

    return read


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x.new_zeros(3).nonzero(),
        lambda x: x.expand(2)[x.expand(2) > 0],
        lambda x: x.cpu(),
        lambda x: torch.tensor(3.0) + x,
        lambda x: torch.equal(x, x),
    ],
)
def test_waits_are_noticed(wait):
    with pytest.raises(AssertionError, match="host"), NoWaiting():
        wait(torch.ones(()))


INNER_LOOPS = {
    "clipped": {},
    "not clipped": {"clip": 0.0},
    "first order": {"mode": "first_order"},
    "save_activations": {"memory_policy": "save_activations"},
    "save_all": {"memory_policy": "save_all"},
    "two levels": {"two_level": True},
}


def _masked_batch():
    """With a chunk whose targets are all masked."""
    tokens, targets, mask = batch()
    mask[1, 4:8] = False
    return tokens, targets, mask


@pytest.mark.parametrize("programs", [False, True], ids=["direct", "programs"])
@pytest.mark.parametrize("case", INNER_LOOPS)
def test_both_sweeps(case, programs):
    model = learner(inner=INNER_LOOPS[case], dtype=torch.float32, compute_dtype=torch.bfloat16)
    if programs:
        model.runner = ChunkPrograms()
    swept = []

    def watched(method: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            with NoWaiting():
                result = method(*args)
            swept.append(method)
            return result

        return wrapper

    with (
        patch.object(MetaRun, "forward", watched(MetaRun.forward)),
        patch.object(MetaRun, "backward", watched(MetaRun.backward)),
    ):
        model(*_masked_batch()).loss.backward()
    assert len(swept) == 2


def test_a_whole_training_pass():
    """Prefix and reports too."""
    model = learner()
    data = _masked_batch()
    with NoWaiting():
        model(*data).loss.backward()


@pytest.mark.parametrize("final_step", [False, True])
def test_evaluation(final_step):
    data = _masked_batch()
    with torch.no_grad(), NoWaiting():
        learner()(*data, final_step=final_step, logits_of=(0, 2))


def test_decoding_a_chunk():
    """Tokens are checked as they come in, once a call; then nothing is read back."""
    session = Session(learner(), batch=3, bos_id=0)
    tokens, _, _ = batch()
    tokens = session._checked(tokens)
    with patch.object(Session, "_checked", lambda _, given: given), NoWaiting():
        session.prefill(tokens[:, :10])
        for column in range(10, 14):
            session.read(tokens[:, column : column + 1])
    assert session.steps_taken == 3
