"""Tells the tensors of a training step apart, under the planner's names of kinds of memory."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

from ttt_kernels.swa_attention import core
from ttt_megatron.bench.live_bytes import LiveBytes
from ttt_megatron.meta import meta_loss
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.meta_loss import MetaRun
from ttt_megatron.meta.reverse_sweep import Cotangents
from ttt_megatron.parallel.context import _Halo
from ttt_megatron.parallel.context_links import Channel
from ttt_megatron.training.optimizer import OuterOptimizer
from ttt_megatron.training.optimizer_state import AdamState

UNDER_WAY = "messages under way"
IN_PREFIX = "prefix activations"
IN_SUFFIX = "suffix activations"


@contextmanager
def kinds_told(live: LiveBytes) -> Iterator[None]:
    """Within, gives every tensor of a run its kind: what it is made for, or what it becomes."""

    def made_for(kind: str) -> Callable[..., Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with live.of_kind(kind):
                    return function(*args, **kwargs)

            return wrapper

        return decorate

    def then(tell: Callable[..., None]) -> Callable[..., Any]:
        """Calls `tell(result, *arguments)` after each call."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                tell(result, *args)
                return result

            return wrapper

        return decorate

    def buffer_made(_: None, buffer: Any, *rest: Any) -> None:
        live.assign("weights", buffer.param_data)
        live.assign("gradients", buffer.grad_data)

    def stepped(kept: Any, problem: Any, prefix_output: Any, state: Any, *rest: Any) -> None:
        live.assign("fast weights in use", state.fast)
        live.assign("keys and values", [list(kv) for kv in state.kv._buffers])
        if kept is not None:
            live.assign("fast-weight history", kept.gradient)
            entries = [kept.head, *(kept.tape.entries if kept.tape else [])]
            values = [[e.output, e.lse, list(e.adjoints.values())] for e in entries]
            live.assign("kept by the forward sweep", values)

    def swept(_: Any, run: MetaRun, *rest: Any) -> None:
        live.assign("fast-weight history", run.starts)
        live.assign("prefix output", run.prefix_output)
        live.assign("kept by the forward sweep", run.report.token_nll)

    def pulled(fast: Any, problem: Any, graph: Any, cotangents: Cotangents, *rest: Any) -> None:
        live.assign("fast weights in use", fast, cotangents.fast)
        live.assign("keys and values", [list(kv) for kv in cotangents.kv._buffers])
        live.assign("prefix output", cotangents.prefix_output)
        grads = [leaf.grad for leaf in cotangents.slow]
        live.assign("slow gradients of the sweep", grads)

    def received(past: Any, *rest: Any) -> None:
        live.assign("halo", past and list(past))

    def scored(rows: Any, *rest: Any) -> None:
        live.assign("attention scores", rows[0])

    def sent(_: None, channel: Channel, message: Any, *rest: Any) -> None:
        live.assign(UNDER_WAY, message)

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (_ParamAndGradBuffer, "__init__", then(buffer_made)),
        (AdamState, "_allocate", made_for("optimizer")),
        (OuterOptimizer, "step", made_for("optimizer")),
        (Learner, "run_prefix", made_for(IN_PREFIX)),
        (MetaRun, "forward", made_for(IN_SUFFIX)),
        (MetaRun, "backward", made_for(IN_SUFFIX)),
        (MetaRun, "forward", then(swept)),
        (meta_loss, "step_through_chunk", then(stepped)),
        (meta_loss, "pull_back", then(pulled)),
        (meta_loss, "reverse_step", then(lambda _, *args: pulled((), args[0], None, args[5]))),
        (_Halo, "exchange", then(received)),
        (core, "softmax_rows", then(scored)),
        (Channel, "send", then(sent)),
    ]
    with ExitStack() as stack:
        for owner, name, decorate in changes:
            stack.enter_context(patch.object(owner, name, decorate(getattr(owner, name))))
        yield


def watched_step(function: Callable[..., Any], live: LiveBytes, found: list[Counter[str]]) -> Any:
    """A training step that appends the bytes by kind when most were live."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with live.highest() as highest:
            result = function(*args, **kwargs)
        found.append(highest)
        return result

    return wrapper
