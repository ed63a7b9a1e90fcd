"""The language model in the parts a meta step needs.

The *prefix* is everything no fast weight can reach: the embedding, the first L − S blocks and
the attention of the first suffix block. It runs over a whole sequence at once. The *suffix* is
the rest; a meta step runs it chunk by chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ttt_kernels
from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.attention import KV
from ttt_megatron.model.block import Block
from ttt_megatron.model.mlp import FastMLP
from ttt_megatron.model.ops import Operand
from ttt_megatron.model.part import WHOLE, SequencePart
from ttt_megatron.model.slots import Slots
from ttt_megatron.model.stage import Stage


class LanguageModel(nn.Module):
    """Decoder-only transformer with prime MLPs in its last blocks; or a stage of one.

    A stage has the parameters of its own blocks, by their names in the whole. One that is last
    holds a tied embedding too, as its head.

    Raises ValueError if the configuration has no vocabulary size.
    """

    def __init__(
        self, config: ModelConfig, slots: Slots | None = None, stage: Stage | None = None
    ) -> None:
        super().__init__()
        slots = slots or Slots()
        stage = stage or Stage(0, config.num_layers)
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set")
        self.config = config
        self.slots = slots
        self.stage = stage
        self.head_dim = config.hidden_size // config.num_heads
        self.num_prefix_layers = config.num_layers - config.num_suffix_layers
        if stage.is_first or (stage.is_last and config.tie_embeddings):
            self.embedding = slots.embedding(config.vocab_size, config.hidden_size)
        kinds = config.mixer_kinds
        self.layers = nn.ModuleDict(
            {
                str(index): Block(
                    config, slots, prime=index >= self.num_prefix_layers, kind=kinds[index]
                )
                for index in range(stage.first, stage.stop)
            }
        )
        self.output: nn.Module | None = None
        if stage.is_last:
            self.final_norm = slots.norm(config.hidden_size, config.norm_eps)
            if not config.tie_embeddings:
                self.output = slots.column(config.hidden_size, config.vocab_size)

    def blocks(self, start: int = 0, stop: int | None = None) -> list[Block]:
        """Blocks start … stop−1, or those of them that this stage holds."""
        stop = self.config.num_layers if stop is None else stop
        held = range(max(start, self.stage.first), min(stop, self.stage.stop))
        chosen = [self.layers[str(index)] for index in held]
        return [block for block in chosen if isinstance(block, Block)]

    @property
    def suffix_blocks(self) -> list[Block]:
        """The last S blocks."""
        return self.blocks(self.num_prefix_layers)

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, H]: the embedding where it is tied."""
        weight = (self.output if self.output is not None else self.embedding).weight
        assert isinstance(weight, Tensor)
        return weight

    def initial_fast_weights(self) -> list[FastMLP]:
        """The prime MLPs' parameters, in the suffix blocks' order."""
        return [block.prime_mlp.initial for block in self.suffix_blocks if block.prime_mlp]

    def rotations(self, start: int, length: int, like: Tensor) -> Tensor:
        """The angles of positions start … start+length−1: complex [length, d/2]."""
        return ttt_kernels.rotations(start, length, self.head_dim, self.config.rope_theta, like)

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[b, T] int64 → [b, T, H] in the compute dtype."""
        return self.slots.own_tokens(self.embedding(tokens).to(dtype))

    def prefix_blocks(
        self,
        x: Tensor,
        rotation: Tensor,
        recompute: bool = False,
        part: SequencePart = WHOLE,
    ) -> Tensor:
        """The first L − S blocks over all tokens at once: the stream that enters the suffix.

        A stage runs those of them that it holds.
        """
        for block in self.blocks(0, self.num_prefix_layers):
            x = run_whole(block, x, rotation, recompute, part)
        return x

    def enter_suffix(self, x: Tensor, rotation: Tensor, part: SequencePart = WHOLE) -> Tensor:
        """The attention of the first suffix block over all tokens at once."""
        attended = self.suffix_blocks[0].attend(x, rotation, part.find_past())[0]
        return self.slots.all_tokens(attended)

    def suffix(
        self,
        x: Operand,
        rotation: Tensor,
        past: Sequence[KV | None],
        fast: Sequence[FastMLP | None],
    ) -> tuple[Operand, list[KV]]:
        """The suffix over one chunk, from the output of `enter_suffix` to the final norm.

        x [b, C, H]; past holds the S − 1 later blocks' keys and values just before the chunk,
        fast the S prime MLPs' weights. Returns [b, C, H] and the chunk's own keys and values.
        """
        first, *later = self.suffix_blocks
        x = first.feed_forward(x, fast[0])
        own: list[KV] = []
        for block, cached, weights in zip(later, past, fast[1:], strict=True):
            x, kv = block(x, rotation, cached, weights)
            own.append(kv)
        return self.final_norm(x), own

    def plain_blocks(
        self,
        x: Tensor,
        rotation: Tensor,
        recompute: bool = False,
        part: SequencePart = WHOLE,
    ) -> Tensor:
        """The plain model, prime MLPs static: the stream [b, T, H] after all blocks."""
        for block in self.blocks():
            x = run_whole(block, x, rotation, recompute, part)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] → [..., V] in the compute dtype."""
        return self.entered_logits(self.slots.head.enter(hidden))

    def entered_logits(self, hidden: Tensor) -> Tensor:
        """The same of hidden states that have entered the head, of all tokens or of some."""
        return self.slots.head.whole(ttt_kernels.linear(hidden, self.head_weight))

    def loss(self, hidden: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ token_weights·nll, nll [b, T]) of hidden states that have entered the head."""
        return ttt_kernels.linear_cross_entropy(
            hidden, self.head_weight, targets, token_weights, self.slots.head.shard
        )


def run_whole(
    block: Block, x: Tensor, rotation: Tensor, recompute: bool, part: SequencePart
) -> Tensor:
    """A block over all tokens, its activations recomputed in the backward pass or kept."""
    past = part.find_past()
    if recompute and torch.is_grad_enabled():
        out: Tensor = checkpoint(lambda y: block(y, rotation, past)[0], x, use_reentrant=False)
        return out
    return block(x, rotation, past)[0]
