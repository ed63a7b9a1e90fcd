"""What the forward sweep keeps of a chunk for the reverse sweep, by memory policy.

The operations that multiply matrices write one entry each, in the order they run: their output
(`save_activations`) and the adjoints of their inputs (`save_all`). The reverse sweep runs the
same operations on pairs and reads the entries in the same order. The cotangent of a tangent is
−lr times the adjoint the forward sweep computed for the value itself, so a kept adjoint spares a
matrix product; the reverse sweep scales them all before it starts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ttt_kernels
from ttt_kernels.swa_attention.op import swa_attention_saved
from ttt_megatron.config.schema import MemoryPolicy
from ttt_megatron.model import ops


@dataclass
class Entry:
    """One operation's output and the adjoints of its inputs, as far as kept."""

    output: Tensor | None = None
    lse: Tensor | None = None
    adjoints: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Tape:
    """The entries of one chunk."""

    policy: MemoryPolicy
    entries: list[Entry] = field(default_factory=list)

    def new_entry(self) -> Entry:
        """Append an entry for the operation about to run."""
        self.entries.append(Entry())
        return self.entries[-1]


@dataclass(frozen=True)
class Kept:
    """An entry as the reverse sweep sees it."""

    entry: Entry

    @property
    def output(self) -> Tensor | None:
        """The operation's primal output, if kept."""
        return self.entry.output

    @property
    def lse(self) -> Tensor | None:
        """Attention's log-sum-exp, if kept."""
        return self.entry.lse

    def dot_input(self, index: int = 0) -> Tensor | None:
        """The cotangent of the tangent of an input, if its adjoint was kept."""
        return self.entry.adjoints.get(index)


class Playback:
    """Reads a tape in order; without a tape (`recompute`) every entry is empty."""

    def __init__(self, tape: Tape | None) -> None:
        self._entries = None if tape is None else iter(tape.entries)

    def next(self) -> Kept:
        """The entry of the operation about to run."""
        entry = Entry() if self._entries is None else next(self._entries)
        return Kept(entry)


@dataclass(frozen=True)
class Recorded:
    """A tensor whose operations are recorded."""

    value: Tensor
    tape: Tape

    def like(self, value: Tensor) -> "Recorded":
        """Another tensor of the same pass."""
        return Recorded(value, self.tape)


class _KeepAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, entry: Entry, index: int) -> Tensor:
        ctx.entry, ctx.index = entry, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, None, None]:
        kept = adjoint.detach()
        # A view, as of a chunk's own keys among the cached ones, would keep all it looks into.
        if kept.untyped_storage().nbytes() > kept.nbytes:
            kept = kept.clone(memory_format=torch.contiguous_format)
        ctx.entry.adjoints[ctx.index] = kept
        return adjoint, None, None


def keep_adjoint(x: Tensor, entry: Entry, index: int = 0) -> Tensor:
    """x itself; its adjoint through this use is written into the entry during the backward pass."""
    kept: Tensor = _KeepAdjoint.apply(x, entry, index)
    return kept


def _recorded_input(x: Recorded, entry: Entry, index: int = 0) -> Tensor:
    return keep_adjoint(x.value, entry, index) if x.tape.policy == "save_all" else x.value


@ops.primal.rule(Recorded)
def _primal(x: Recorded) -> Tensor:
    return x.value


@ops.add.rule(Recorded)
def _add(x: Recorded, y: Recorded) -> Recorded:
    return x.like(x.value + y.value)


@ops.linear.rule(Recorded)
def _linear(x: Recorded, weight: Tensor) -> Recorded:
    entry = x.tape.new_entry()
    out = ttt_kernels.linear(_recorded_input(x, entry), weight)
    entry.output = out.detach()
    return x.like(out)


@ops.fast_linear.rule(Recorded)
def _fast_linear(x: Recorded, weight: Tensor) -> Recorded:
    entry = x.tape.new_entry()
    out = ttt_kernels.fast_linear(_recorded_input(x, entry), weight)
    entry.output = out.detach()
    return x.like(out)


@ops.rms_norm.rule(Recorded)
def _rms_norm(x: Recorded, gain: Tensor, *, eps: float) -> Recorded:
    return x.like(ttt_kernels.rms_norm(x.value, gain, eps))


@ops.swiglu.rule(Recorded)
def _swiglu(gate_up: Recorded) -> Recorded:
    return gate_up.like(ttt_kernels.swiglu(gate_up.value))


@ops.rope.rule(Recorded)
def _rope(x: Recorded, rotation: Tensor) -> Recorded:
    return x.like(ttt_kernels.rope(x.value, rotation))


@ops.split_heads.rule(Recorded)
def _split_heads(qkv: Recorded, **shape: int) -> tuple[Recorded, ...]:
    return tuple(qkv.like(part) for part in ops.split_heads(qkv.value, **shape))


@ops.map_tokens.rule(Recorded)
def _map_tokens(x: Recorded, function: Callable[[Tensor], Tensor]) -> Recorded:
    return x.like(function(x.value))


@ops.merge_heads.rule(Recorded)
def _merge_heads(x: Recorded) -> Recorded:
    return x.like(ops.merge_heads(x.value))


@ops.attention.rule(Recorded)
def _attention(
    q: Recorded,
    k: Recorded,
    v: Recorded,
    past_k: Tensor | None,
    past_v: Tensor | None,
    *,
    window: int | None,
) -> Recorded:
    entry = q.tape.new_entry()
    own_q, own_k, own_v = (_recorded_input(x, entry, i) for i, x in enumerate((q, k, v)))
    saved = swa_attention_saved(own_q, own_k, own_v, window, past_k, past_v)
    entry.output, entry.lse = saved.out.detach(), saved.lse
    return q.like(saved.out)
