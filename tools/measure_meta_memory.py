"""Memory of a meta step by kind, as the number of chunks grows.

    python tools/measure_meta_memory.py
    python tools/measure_meta_memory.py --chunks 8 16 --policy save_all

Kinds, in bytes of live tensors: the fast-weight history (segment starts and inner gradients), the
prefix's activations, the prefix output with its cotangent, the suffix's keys and values with
their cotangents, what the sweeps keep per token (final adjoints, losses), and the suffix's
activations (the highest number above the start of any one chunk).
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from meta_shape import add_shape, shape_of

from ttt_megatron.bench.live_bytes import LiveBytes, tensor_bytes
from ttt_megatron.config.schema import InnerConfig
from ttt_megatron.meta import meta_loss
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.meta_loss import MetaRun

KINDS = (
    "history",
    "prefix activations",
    "prefix output",
    "keys and values",
    "kept per token",
    "suffix activations",
)


def build(arguments: argparse.Namespace, two_level: bool) -> Learner:
    """A learner of the given shape."""
    inner = InnerConfig(
        chunk_size=arguments.chunk, two_level=two_level, memory_policy=arguments.policy
    )
    return Learner(shape_of(arguments), inner)


def measure(arguments: argparse.Namespace, chunks: int, two_level: bool) -> dict[str, int]:
    """Run one meta step and take each kind at its highest."""
    learner = build(arguments, two_level)
    rows = torch.randint(arguments.vocabulary, (arguments.batch, chunks * arguments.chunk + 1))
    tokens, targets = rows[:, :-1], rows[:, 1:]
    mask = torch.ones_like(targets, dtype=torch.bool)
    found = dict.fromkeys(KINDS, 0)
    suffix: list[int] = []

    def record(run: MetaRun) -> None:
        gradients = [step.gradient for step in run.history]
        history = tensor_bytes(run.starts, gradients)
        heads = [list(step.head.adjoints.values()) for step in run.history]
        tapes = [
            [e.output, e.lse, list(e.adjoints.values())]
            for step in run.history
            if step.tape
            for e in step.tape.entries
        ]
        kept = tensor_bytes(heads, tapes, run.report.token_nll)
        found["history"] = max(found["history"], history)
        found["kept per token"] = max(found["kept per token"], kept)
        found["keys and values"] = max(found["keys and values"], 2 * run.state.kv.nbytes)
        found["prefix output"] = max(found["prefix output"], 2 * tensor_bytes(run.prefix_output))

    with LiveBytes() as live:

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with live.peak_above_start(suffix):
                    return function(*args, **kwargs)

            return wrapper

        def observed(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(run: MetaRun, *args: Any, **kwargs: Any) -> Any:
                result = function(run, *args, **kwargs)
                record(run)
                return result

            return wrapper

        start = live.now()
        before: list[int] = []

        def entered(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(problem: Any, prefix_output: Any) -> Any:
                before.append(live.now() - start - tensor_bytes(prefix_output))
                return function(problem, prefix_output)

            return wrapper

        with (
            patch.object(meta_loss, "reverse_step", watched(meta_loss.reverse_step)),
            patch.object(meta_loss, "step_through_chunk", watched(meta_loss.step_through_chunk)),
            patch.object(MetaRun, "_run_segment", observed(MetaRun._run_segment)),
            patch.object(MetaRun, "_rerun", observed(MetaRun._rerun)),
            patch("ttt_megatron.meta.learner.meta_loss", entered(meta_loss.meta_loss)),
        ):
            learner(tokens, targets, mask).loss.backward()
    found["prefix activations"] = before[0]
    found["suffix activations"] = max(suffix[1:])  # the first chunk also allocates keys and values
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape(
        parser,
        prefix=3,
        suffix=2,
        width=128,
        heads=4,
        mlp=256,
        vocabulary=512,
        chunk=64,
        window=128,
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument(
        "--policy", default="recompute", choices=("recompute", "save_activations", "save_all")
    )
    arguments = parser.parse_args()
    for two_level in (False, True):
        print(f"\n{'two-level checkpointing' if two_level else 'one level'}, KiB")
        print(f"{'chunks':>8s}" + "".join(f"{kind:>20s}" for kind in KINDS))
        results = {n: measure(arguments, n, two_level) for n in arguments.chunks}
        for n, found in results.items():
            print(f"{n:8d}" + "".join(f"{found[kind] / 1024:20.1f}" for kind in KINDS))
        tokens = {n: n * arguments.chunk * arguments.batch for n in results}
        print("bytes a token")
        for n, found in results.items():
            print(f"{n:8d}" + "".join(f"{found[kind] / tokens[n]:20.1f}" for kind in KINDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
