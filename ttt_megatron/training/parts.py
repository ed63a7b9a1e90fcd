"""What a rank reads of a batch: all of it, or under context parallelism its parts of every row."""

from dataclasses import dataclass

from torch import Tensor

from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.part import WHOLE, Part
from ttt_megatron.parallel.context import context_parts, own_tokens, part_length
from ttt_megatron.parallel.context_links import ContextLinks


@dataclass(frozen=True, kw_only=True)
class OwnTokens:
    """A rank's tokens, targets and mask [b, P] of a batch, and which part of its rows they are."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    part: Part

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets and mask."""
        return self.tokens, self.targets, self.mask


def own_parts(batch: Batch, links: ContextLinks | None, learner: Learner) -> list[OwnTokens]:
    """This rank's parts of a batch that all ranks of `links` have; the whole without links.

    Raises UserError if the rows cannot be cut into equal parts of whole chunks.
    """
    if links is None:
        whole = OwnTokens(tokens=batch.tokens, targets=batch.targets, mask=batch.mask, part=WHOLE)
        return [whole]
    length = part_length(batch.tokens.shape[1], learner.inner.chunk_size, links.num_parts)
    parts = context_parts(links, length, learner.model.config.window_size)
    tensors = (own_tokens(x, links) for x in (batch.tokens, batch.targets, batch.mask))
    return [
        OwnTokens(tokens=tokens, targets=targets, mask=mask, part=part)
        for part, tokens, targets, mask in zip(parts, *tensors, strict=True)
    ]
