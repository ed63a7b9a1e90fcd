"""Counts the FLOPs of matrix products as they run, in-place and out= forms included."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# index of the first factor among the arguments
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}
FLOAT8 = "_scaled_mm"


class CountFlops(TorchDispatchMode):
    """Within this context `total` grows by 2·m·n·k for every product of [m, k] and [k, n], and
    `float8` by those of products in float8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.float8 = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func._overloadpacket.__name__
        first = 0 if name == FLOAT8 else PRODUCTS.get(name)
        if first is not None:
            a, b = args[first], args[first + 1]
            flops = 2 * a.numel() * b.shape[-1]
            self.total += flops
            self.float8 += flops if name == FLOAT8 else 0
        elif "matmul" in func.name() or "linear" in func.name() or "dot_product" in func.name():
            raise RuntimeError(f"{func.name()} is a product this counter does not know")
        return func(*args, **(kwargs or {}))


def count_flops(step: Any) -> int:
    """FLOPs of matrix products in one call of `step`, its backward pass included."""
    with CountFlops() as counter:
        step()
    return counter.total
