"""How the scales of a linear map's tensors are found.

What a meta step sends through a linear map differs by orders of magnitude, so each of its roles
has scales of its own.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ttt_kernels.fp8_linear.float8 import (
    E4M3,
    E5M2,
    Float8,
    History,
    fitting_exponent,
    power_of_two,
    round_sides,
)

Role = Literal["input", "tangent", "adjoint", "cotangent", "tangent_cotangent"]
"""input: the primal input. tangent: its tangent. cotangent: the output's gradient in a pass that
forms the weight's. adjoint: the same in a pass that does not, an inner step's. tangent_cotangent:
the gradient of the output's tangent.
"""

DTYPES: dict[Role, torch.dtype] = {
    "input": E4M3,
    "tangent": E4M3,
    "adjoint": E5M2,
    "cotangent": E5M2,
    "tangent_cotangent": E5M2,
}
ROLES: tuple[Role, ...] = tuple(DTYPES)

_NONE = -1000
_HEADROOM = 1
"""Powers of two that delayed scales leave free: a step's largest value may grow by as much before
it saturates. Of the range of either format they are a small part.
"""


class CurrentScaling(nn.Module):
    """Scales from the tensor at hand: one for all of it, or one a row."""

    def __init__(self, *, rowwise: bool = False) -> None:
        super().__init__()
        self.rowwise = rowwise

    def round(self, x: Tensor, role: Role) -> Float8:
        """x [rows, k] in the role's format."""
        [rounded] = self.round_sides(x, role)
        return rounded

    def round_sides(
        self, x: Tensor, role: Role, *, straight: bool = True, turned: bool = False
    ) -> list[Float8]:
        """The same, its transpose [k, rows], or one after the other."""
        return round_sides(x, DTYPES[role], straight=straight, turned=turned, rowwise=self.rowwise)

    def round_weight(self, weight: Tensor) -> list[Float8]:
        """A weight [out, in] and its transpose: always by its own values."""
        return round_sides(weight, E4M3, turned=True, rowwise=self.rowwise)


class DelayedScaling(CurrentScaling):
    """One scale a role, from the largest values of past steps.

    Between two calls of `advance` no scale moves, whatever is rounded: a pass that is recomputed
    gets the values it had. Where a role has no history yet, the tensor at hand gives the scale,
    which the recomputed pass finds again. Values that are not finite leave no trace in the
    history.

    history [roles, steps], newest first, and pending [roles], what this step has seen so far, are
    float32 (0 is nothing); exponents [roles] int32 are the scales' powers of two, `_NONE` where
    there is no history.
    """

    history: Tensor
    pending: Tensor
    exponents: Tensor

    def __init__(self, *, steps: int) -> None:
        super().__init__(rowwise=False)
        self.register_buffer("history", torch.zeros(len(ROLES), steps), persistent=False)
        self.register_buffer("pending", torch.zeros(len(ROLES)), persistent=False)
        self.register_buffer(
            "exponents", torch.full((len(ROLES),), _NONE, dtype=torch.int32), persistent=False
        )

    def round_sides(
        self, x: Tensor, role: Role, *, straight: bool = True, turned: bool = False
    ) -> list[Float8]:
        """As the base class; what does not fit saturates."""
        place = ROLES.index(role)
        history = History(self.exponents[place], self.pending[place])
        return round_sides(
            x.detach(), DTYPES[role], straight=straight, turned=turned, history=history
        )

    def power(self, amax: Tensor, role: Role) -> Tensor:
        """The scale [] of a tensor of this role whose largest absolute value is amax, []: float32.

        For roundings done elsewhere. amax counts as seen; the scale is NaN where it is not finite.
        """
        place = ROLES.index(role)
        seen = torch.where(amax.isfinite(), amax, 0).to(self.pending)
        self.pending[place].copy_(torch.maximum(self.pending[place], seen))
        known, fitting = self.exponents[place], fitting_exponent(amax, DTYPES[role])
        return power_of_two(torch.where(known == _NONE, fitting, known)) + amax * 0

    def begin(self) -> None:
        """Forget what was seen since `advance`: passes that train nothing, as evaluations."""
        self.pending.zero_()

    def advance(self, pending: Tensor | None = None) -> None:
        """End a step: its largest values enter the history, and the scales move.

        `pending` are those of all processes, [roles]; without them this one's alone.
        """
        newest = self.pending if pending is None else pending.to(self.history)
        rest = self.history[:, :-1]
        self.load(torch.cat((newest.unsqueeze(1).to(self.history), rest), dim=1))

    def load(self, history: Tensor) -> None:
        """Stand where a history [roles, steps] leads to, at the start of a step."""
        self.history.copy_(history)
        self.pending.zero_()
        amax = self.history.float().amax(dim=1)
        for place, role in enumerate(ROLES):
            fitting = fitting_exponent(amax[place], DTYPES[role]) - _HEADROOM
            known = fitting.clamp(min=-126)
            self.exponents[place].copy_(torch.where(amax[place] > 0, known, _NONE))
