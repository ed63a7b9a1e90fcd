"""What megatron-core takes for granted and this process may not have: CUDA, and float32 parameters.

megatron-core 0.16 asks torch for the current CUDA device, writes `device="cuda"` literally, and
compares `Tensor.type()` with CUDA type names. Without CUDA the process's device is the CPU, and
`megatron_scope` makes those questions find it. With CUDA present nothing here changes anything.

The distributed optimizer knows float32 main parameters only. In a scope with `float64=True` it
holds float64 ones: there, float32 is read as float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _MegatronMode(TorchFunctionMode):
    """Rewrites the few calls named in the module's docstring; every other call passes through."""

    def __init__(self, *, on_cpu: bool, float64: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu
        self._float64 = float64

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return self._type_name(args[0])
        if self._float64 and func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if kwargs:
            kwargs = self._translate(kwargs)
        return func(*args, **(kwargs or {}))

    def _type_name(self, tensor: torch.Tensor) -> str:
        dtype = tensor.dtype
        if self._float64 and dtype == torch.float64:
            dtype = torch.float32
        if (tensor.is_cuda or self._on_cpu) and dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[dtype]
        return tensor.type()

    def _translate(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._on_cpu and kwargs.get("device") == "cuda":
            kwargs = kwargs | {"device": torch.device("cpu")}
        if self._float64 and kwargs.get("dtype") == torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return kwargs


@contextmanager
def megatron_scope(*, float64: bool = False) -> Iterator[None]:
    """Wraps every call into megatron-core that makes, checks or moves tensors.

    `float64`: the distributed optimizer works on float64 parameters (its construction, gradient
    copies and checkpoints; not the forward and backward passes, which need no such reading).
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu or float64:
        with _MegatronMode(on_cpu=on_cpu, float64=float64):
            yield
    else:
        yield


def _cpu_device() -> torch.device:
    return torch.device("cpu")


def _nothing_to_wait_for(device: Any = None) -> None:
    """The CPU has no streams."""


def install_standins() -> None:
    """Answers `torch.cuda.current_device` and `synchronize` where CUDA is absent; idempotent.

    These two are patched for the whole process: megatron-core calls them from the hooks and
    checkpoint writers that no scope encloses, and without CUDA they could only raise.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
        torch.cuda.synchronize = _nothing_to_wait_for
