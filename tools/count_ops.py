"""Count the kernels that a chunk launches on a GPU, in either sweep; needs none.

    python tools/count_ops.py
    python tools/count_ops.py --policy save_all --by-name

A launch is an operation that torch dispatches, unless it only makes a view or memory, or a Triton
kernel. Triton kernels are counted and not run, so the numbers that the operations work on mean
nothing here; no value decides what is launched next. What a chunk costs is the difference between
sequences of 4 and of 3 chunks; what a block costs, that between suffixes of 3 blocks and of 2.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

# Operations choose Triton by it, whatever the device; read when they are first called.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_kernels import triton_launch
from ttt_megatron.config.schema import InnerConfig, MemoryPolicy, ModelConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.meta_loss import MetaRun

CHUNK = 16
POLICIES: tuple[MemoryPolicy, ...] = ("recompute", "save_activations", "save_all")
NO_KERNEL = {
    "detach",
    "alias",
    "_reshape_alias",
    "_unsafe_view",
    "empty.memory_format",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_conj",
    "lift_fresh",
}


class Launches(TorchDispatchMode):
    """Counts what is launched within."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts and runs one operation."""
        name = function.name().removeprefix("aten::")
        returns = function._schema.returns
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not views and name not in NO_KERNEL:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def triton(self, kernel: Any, grid: tuple[int, ...], *_: Any, **__: Any) -> None:
        """Counts one Triton kernel instead of launching it."""
        if 0 not in grid:
            self.found[f"triton {kernel.fn.__name__}"] += 1


def _within(launches: Launches, method: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        with launches, patch.object(_Launch, "to", launches):
            return method(*args)

    return counted


class _Launch:
    """What Triton modules import as `launch`: counts in whichever sweep runs."""

    to: Launches | None = None

    def __call__(self, *args: Any, **constants: Any) -> None:
        if self.to is not None:
            self.to.triton(*args, **constants)


def count(suffix: int, chunks: int, policy: MemoryPolicy) -> tuple[Counter[str], Counter[str]]:
    """Launches of the forward and of the reverse sweep of one micro-batch in bfloat16."""
    model = ModelConfig(
        vocab_size=64,
        num_layers=suffix + 1,
        num_suffix_layers=suffix,
        hidden_size=32,
        num_heads=2,
        ffn_hidden_size=48,
        window_size=CHUNK,
    )
    inner = InnerConfig(chunk_size=CHUNK, memory_policy=policy)
    learner = Learner(model, inner, compute_dtype=torch.bfloat16)
    rows = torch.randint(64, (2, chunks * CHUNK + 1))
    mask = torch.ones(2, chunks * CHUNK, dtype=torch.bool)
    forward, reverse = Launches(), Launches()
    with (
        patch.object(MetaRun, "forward", _within(forward, MetaRun.forward)),
        patch.object(MetaRun, "backward", _within(reverse, MetaRun.backward)),
    ):
        learner(rows[:, :-1], rows[:, 1:], mask).loss.backward()
    return forward.found, reverse.found


def per_chunk(suffix: int, policy: MemoryPolicy) -> tuple[Counter[str], Counter[str]]:
    """What one further chunk launches in either sweep."""
    more, fewer = count(suffix, 4, policy), count(suffix, 3, policy)
    return more[0] - fewer[0], more[1] - fewer[1]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--by-name", action="store_true", help="which kernels they are")
    arguments = parser.parse_args()
    with patch.object(triton_launch, "launch", _Launch()):
        print(f"{'policy':18s}{'sweep':>9s}{'a chunk, 3 blocks':>20s}{'a further block':>18s}")
        for policy in arguments.policy:
            three, two = per_chunk(3, policy), per_chunk(2, policy)
            for sweep, found, fewer in zip(("forward", "reverse"), three, two, strict=True):
                further = found.total() - fewer.total()
                print(f"{policy:18s}{sweep:>9s}{found.total():20d}{further:18d}")
                if arguments.by_name:
                    for name, times in found.most_common():
                        print(f"{'':27s}{times:20d}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
