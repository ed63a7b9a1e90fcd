"""What happens to a tile of logits between two matrix products, in Triton, a row a token.

`read_kernel` takes a tile into its tokens' running sums (`RowSums`); it can leave e^(z − maximum)
in the tile, for a product that is rescaled later. `gradient_kernel` turns a tile, in place, into
the cotangents of its logits. Everything is float32 between load and store. A row belongs to one
program at a time, so results do not depend on timing.
"""
# mypy: disallow-untyped-defs=False

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_kernels.triton_launch import launch, next_power_of_two

READ_COLUMNS = 4096
GRADIENT_COLUMNS = 2048


@triton.jit
def read_kernel(
    logits_ptr,
    dot_ptr,
    target_ptr,
    state_ptr,
    columns,
    first,
    tokens,
    stride_logits,
    stride_dot,
    TANGENT: tl.constexpr,
    POWERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    dot_ptr += row * stride_dot
    state_ptr += row
    target = tl.load(target_ptr + row) - first
    here = (target >= 0) & (target < columns)
    before = tl.load(state_ptr)
    total = tl.load(state_ptr + tokens)
    # The reductions below keep any thread from writing before all have read these.
    wanted = tl.load(state_ptr + 2 * tokens)
    wanted += tl.load(logits_ptr + target, mask=here, other=0.0).to(tl.float32)
    held = tl.load(state_ptr + 3 * tokens) + tl.where(here, 1.0, 0.0)
    highest = before
    if TANGENT:
        weighted = tl.load(state_ptr + 4 * tokens)
        dot_wanted = tl.load(state_ptr + 5 * tokens)
        dot_wanted += tl.load(dot_ptr + target, mask=here, other=0.0).to(tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        z = tl.load(logits_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(z, axis=0))
        power = tl.exp(z - higher)
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(power, axis=0)
        if TANGENT:
            dot_z = tl.load(dot_ptr + column, mask=inside, other=0.0).to(tl.float32)
            weighted = weighted * shrink + tl.sum(power * dot_z, axis=0)
        highest = higher
    tl.store(state_ptr, highest)
    tl.store(state_ptr + tokens, total)
    tl.store(state_ptr + 2 * tokens, wanted)
    tl.store(state_ptr + 3 * tokens, held)
    if TANGENT:
        tl.store(state_ptr + 4 * tokens, weighted)
        tl.store(state_ptr + 5 * tokens, dot_wanted)
    if POWERS:
        tl.store(state_ptr + 6 * tokens, tl.exp(before - highest))
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < columns
            z = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
            power = tl.where(column == target, 0.0, tl.exp(z - highest))
            tl.store(logits_ptr + column, power, mask=inside)


@triton.jit
def gradient_kernel(
    logits_ptr,
    dot_ptr,
    target_ptr,
    lse_ptr,
    mean_ptr,
    a_ptr,
    b_ptr,
    columns,
    first,
    stride_logits,
    stride_dot,
    TANGENT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    target = tl.load(target_ptr + row) - first
    a = tl.load(a_ptr + row)
    place = logits_ptr + row * stride_logits + column
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    p = tl.exp(z - tl.load(lse_ptr + row))
    minus = tl.where(column == target, p - 1.0, p)
    if TANGENT:
        b = tl.load(b_ptr + row)
        dot_place = dot_ptr + row * stride_dot + column
        dot_z = tl.load(dot_place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, a * minus + b * p * (dot_z - tl.load(mean_ptr + row)), mask=inside)
        tl.store(dot_place, b * minus, mask=inside)
    else:
        tl.store(place, a * minus, mask=inside)


class RowSums:
    """What is known of a tile's tokens over the logits read so far, each [t] float32.

    `highest` max z, `total` Σe^(z − highest), `wanted` the target's z and `held` 1 if it was seen
    (else both 0), of a pair `weighted` Σe^(z − highest)·ż and `dot_wanted` the target's ż (else 0);
    `shrink`, after a reading with powers, is what sums of earlier powers must be multiplied by.
    """

    def __init__(self, targets: Tensor) -> None:
        """targets [t] int64, contiguous."""
        self.targets = targets
        self._state = torch.zeros(7, len(targets), dtype=torch.float32, device=targets.device)
        self.highest, self.total, self.wanted, self.held, *others = self._state.unbind(0)
        self.weighted, self.dot_wanted, self.shrink = others
        self.highest.fill_(-torch.inf)

    def read(self, logits: Tensor, dot: Tensor | None, first: int, powers: bool = False) -> None:
        """Take in logits [t, w], and their tangents, of vocabulary rows `first` … of all shards'.

        With `powers` the logits become e^(z − highest), 0 at the target.
        """
        other = logits if dot is None else dot
        launch(
            read_kernel,
            (len(logits),),
            logits,
            other,
            self.targets,
            self._state,
            logits.shape[1],
            first,
            len(logits),
            logits.stride(0),
            other.stride(0),
            TANGENT=dot is not None,
            POWERS=powers,
            COLUMNS=min(READ_COLUMNS, next_power_of_two(logits.shape[1])),
            num_warps=8,
        )


def differentiate_(
    logits: Tensor,
    dot: Tensor | None,
    rows: Sequence[Tensor],
    b: Tensor | None,
    first: int,
) -> None:
    """z, ż of vocabulary rows `first` … become z̄ = a(p − 1_t) + b p(ż − ⟨p, ż⟩), ż̄ = b(p − 1_t).

    logits and dot [t, w]; rows are targets (int64), log Σe^z, ⟨p, ż⟩ and a, the weights of nll, and
    b those of its derivative: [t], contiguous, float32.
    """
    columns = min(GRADIENT_COLUMNS, next_power_of_two(logits.shape[1]))
    other = logits if dot is None else dot
    launch(
        gradient_kernel,
        (len(logits), triton.cdiv(logits.shape[1], columns)),
        logits,
        other,
        *rows,
        rows[-1] if b is None else b,
        logits.shape[1],
        first,
        logits.stride(0),
        other.stride(0),
        TANGENT=dot is not None,
        COLUMNS=columns,
        num_warps=4,
    )
