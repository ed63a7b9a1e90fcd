"""The output head, whole or a part of the vocabulary."""

from dataclasses import dataclass

from torch import Tensor

from ttt_kernels.linear_cross_entropy.shard import WHOLE, VocabularyShard
from ttt_megatron.model.ops import Operand


@dataclass(frozen=True)
class Head:
    """How final hidden states reach the vocabulary; a parallel build replaces it."""

    shard: VocabularyShard = WHOLE

    def enter(self, hidden: Operand) -> Operand:
        """The hidden states [b, T, H] as the product with the head's weights needs them."""
        return hidden

    def whole(self, logits: Tensor) -> Tensor:
        """Logits of all of the vocabulary from those of this part: [..., V]."""
        return logits


WHOLE_HEAD = Head()
