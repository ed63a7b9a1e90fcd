"""Counts the FLOPs of matrix products as they run, in-place and out= forms included."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# index of the first factor among the arguments
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}


class CountFlops(TorchDispatchMode):
    """Within this context `total` grows by 2·m·n·k for every product of [m, k] and [k, n]."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        first = PRODUCTS.get(func._overloadpacket.__name__)
        if first is not None:
            a, b = args[first], args[first + 1]
            self.total += 2 * a.numel() * b.shape[-1]
        elif "matmul" in func.name() or "linear" in func.name() or "dot_product" in func.name():
            raise RuntimeError(f"{func.name()} is a product this counter does not know")
        return func(*args, **(kwargs or {}))


def count_flops(step: Any) -> int:
    """FLOPs of matrix products in one call of `step`, its backward pass included."""
    with CountFlops() as counter:
        step()
    return counter.total
