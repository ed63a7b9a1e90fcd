"""How a kernel is described to `tools/compile_kernels.py`, which compiles it without a GPU.

An operation whose folder has a module `compile_cases` with a function `compile_cases()`, returning
a list of `CompileCase`, takes part. What the compiler made of the cases is kept beside it, in
`compiled_<target>.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one tile.

    `signature` gives the type of every argument that is no constant ("*bf16", "*fp32", "i32",
    "fp32", …) and `constants` the value of every other one. `divisible` names the arguments that
    are multiples of 16 (pointers: in bytes) at every launch on common shapes. `tensor_cores` says
    that the kernel's products must run on them. A case may spill registers only with a reason.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: frozenset[str] = frozenset()
    tensor_cores: bool = True
    spills_because: str = ""


_POINTER = "_ptr"
_STRIDE = "stride_"


def describe(
    name: str,
    kernel: Any,
    constants: Mapping[str, Any],
    *,
    element: str,
    num_warps: int,
    num_stages: int,
    others: Mapping[str, str] | None = None,
    tensor_cores: bool = True,
    spills_because: str = "",
) -> CompileCase:
    """A case by the names of the kernel's arguments.

    Arguments ending in `_ptr` point to `element` ("bf16", …); those beginning with `stride_` are
    32-bit integers; both are multiples of 16. `others` gives the type of an argument where that is
    not so; all that is left are plain 32-bit integers.
    """
    types = dict(others or {})
    signature, divisible = {}, set()
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        pointer, stride = argument.endswith(_POINTER), argument.startswith(_STRIDE)
        signature[argument] = types.get(argument, f"*{element}" if pointer else "i32")
        if pointer or stride:
            divisible.add(argument)
    return CompileCase(
        name,
        kernel,
        signature,
        dict(constants),
        num_warps,
        num_stages,
        frozenset(divisible),
        tensor_cores,
        spills_because,
    )
