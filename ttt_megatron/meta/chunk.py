"""One chunk as passes over it see it: what changes from chunk to chunk, and what does not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ttt_kernels import RoundedWeights, using
from ttt_megatron.meta.substitute import ParameterSlot, substituted
from ttt_megatron.model import ops
from ttt_megatron.model.attention import KV
from ttt_megatron.model.mlp import FastMLP
from ttt_megatron.model.ops import Operand
from ttt_megatron.model.transformer import LanguageModel


@dataclass(frozen=True)
class Reading:
    """All a pass over a chunk reads, but the slow weights.

    x [b, C, H] is the chunk's slice of the prefix output, rotation [C, d/2] its angles, targets
    [b, C] int64; the loss is Σ token_weights·nll with token_weights [b, C]. past: what the later
    suffix blocks see before the chunk; fast: one tensor [b, out, in] a fast weight.
    """

    x: Tensor
    rotation: Tensor
    targets: Tensor
    token_weights: Tensor
    past: list[KV | None]
    fast: list[Tensor]


@dataclass(frozen=True)
class Suffix:
    """The suffix of a model and where its slow weights stand, the output head's included.

    `rounded` are copies of slow weights in the compute dtype, as of the start of the pass.
    """

    model: LanguageModel
    slots: tuple[ParameterSlot, ...]
    rounded: RoundedWeights

    def detached(self) -> list[Tensor]:
        """The slow weights as constants."""
        return [slot.tensor.detach() for slot in self.slots]

    @contextmanager
    def weights(self, slow: Sequence[Tensor]) -> Iterator[None]:
        """Within, these tensors are the slow weights; they lie where the weights do."""
        with substituted(self.slots, slow), using(self.rounded):
            yield

    def run(
        self, x: Operand, reading: Reading, past: list[KV | None], fast: list[FastMLP]
    ) -> tuple[Operand, list[KV]]:
        """From `reading.x`, or what stands for it, to the final hidden states and own KV."""
        own = ops.map_tokens(x, self.model.slots.own_tokens)
        return self.model.suffix(own, reading.rotation, past, fast)
