"""The two SwiGLU MLPs of a block: the static one and the prime one, which holds fast weights."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ttt_megatron.model import ops
from ttt_megatron.model.ops import Operand
from ttt_megatron.model.slots import Slots


class MLP(nn.Module):
    """silu(x w1) ⊙ (x w3), then w2; w1 and w3 are the halves of linear_fc1."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, slots: Slots) -> None:
        super().__init__()
        self.linear_fc1 = slots.column(hidden_size, 2 * ffn_hidden_size)
        self.linear_fc2 = slots.row(ffn_hidden_size, hidden_size)

    def forward(self, x: Operand) -> Operand:
        """[b, T, H] → [b, T, H]."""
        return self.linear_fc2(ops.swiglu(self.linear_fc1(x)))


class FastMLP(NamedTuple):
    """Fast weights of one prime MLP: fc1 [b, 2I, H] and fc2 [b, H, I], or without b when shared."""

    fc1: Operand
    fc2: Operand


class PrimeMLP(MLP):
    """The MLP whose weights the inner loop moves; its parameters are their initial values."""

    @property
    def initial(self) -> FastMLP:
        """The fast weights every sequence starts from: [2I, H] and [H, I]."""
        fc1, fc2 = self.linear_fc1.weight, self.linear_fc2.weight
        assert isinstance(fc1, Tensor)
        assert isinstance(fc2, Tensor)
        return FastMLP(fc1, fc2)

    def forward(self, x: Operand, fast: FastMLP | None = None) -> Operand:
        """[b, T, H] → [b, T, H] with the given fast weights, or as a static MLP with its own."""
        if fast is None:
            return super().forward(x)
        fc1: Any = self.linear_fc1
        fc2: Any = self.linear_fc2
        hidden = fc1.leave(ops.fast_linear(fc1.enter(x), fast.fc1))
        return fc2.leave(ops.fast_linear(fc2.enter(ops.swiglu(hidden)), fast.fc2))
