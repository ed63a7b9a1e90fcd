"""megatron-core's functions are compiled when they are first called, not when it is imported.

It hands dozens of small functions to `torch.compile` as their modules are imported, which brings
all of torch's compiler in: half of the time it takes a process to start. No run of ours calls one
of them. This module takes the place of `megatron.core.jit`, with the same names.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

_PLACE = "megatron.core.jit"

Function = Callable[..., Any]


def noop_decorator(func: Function) -> Function:
    """The function itself."""
    return func


def compiled_when_called(func: Function) -> Function:
    """What `torch.compile` makes of the function, made by the first call."""
    compiled: Function | None = None

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            import torch

            compiled = torch.compile(func)
        return compiled(*args, **kwargs)

    return call


jit_fuser: Callable[[Function], Function] = compiled_when_called


def enable_jit_fuser() -> None:
    """Compiles what is decorated from now on."""
    global jit_fuser
    jit_fuser = compiled_when_called


def disable_jit_fuser() -> None:
    """Leaves what is decorated from now on as it is."""
    global jit_fuser
    jit_fuser = noop_decorator


def compile_late() -> None:
    """Takes the place, before megatron-core is imported; changes nothing after that."""
    if "megatron.core" not in sys.modules:
        sys.modules.setdefault(_PLACE, sys.modules[__name__])
