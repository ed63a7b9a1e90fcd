"""What both sweeps work on: a batch of sequences after the prefix, cut into chunks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import RoundedWeights
from ttt_megatron.config.schema import MemoryPolicy
from ttt_megatron.meta.chunk import Reading, Suffix
from ttt_megatron.meta.part import WHOLE, Boundary, Part
from ttt_megatron.meta.passes import DIRECT, Runner
from ttt_megatron.meta.substitute import suffix_parameters
from ttt_megatron.meta.suffix_kv import ChunkCache, SuffixKV
from ttt_megatron.model.attention import KV
from ttt_megatron.model.transformer import LanguageModel


@dataclass(frozen=True, kw_only=True)
class InnerSettings:
    """The inner loop's settings at one outer step.

    `segment_chunks` chunks form a segment of two-level checkpointing; 0 is one segment.
    """

    chunk_size: int
    lr: float
    clip: float
    policy: MemoryPolicy = "recompute"
    segment_chunks: int = 0
    second_order: bool = True


def chunk_token_weights(mask: Tensor, chunk_size: int) -> Tensor:
    """Weights under which a sum over a chunk's tokens is the mean over its unmasked ones.

    mask [b, T] bool → [b, T] float64: m_t / max(Σ m of the chunk, 1e-10). The last chunk may be
    shorter than the others.
    """
    b, length = mask.shape
    padding = -length % chunk_size
    padded = torch.nn.functional.pad(mask.double(), (0, padding)).view(b, -1, chunk_size)
    weights = padded / padded.sum(-1, keepdim=True).clamp_min(1e-10)
    return weights.view(b, -1)[:, :length]


@dataclass(kw_only=True)
class Problem:
    """A batch of sequences, or a part of each, of which the prefix has been run.

    targets [b, T] int64; token_weights [b, T]: see `chunk_token_weights`; chunk losses weigh
    1/(N·b) each in the loss. T, N, chunks and positions are the part's. `runner` runs the passes
    over chunks that are followed by an inner step, `rounded` are the slow weights in the compute
    dtype, those of them that are not rounded in every product.

    Raises ValueError if the sequences are cut into parts elsewhere than between chunks.
    """

    model: LanguageModel
    settings: InnerSettings
    targets: Tensor
    token_weights: Tensor
    rotation: Tensor
    part: Part = WHOLE
    runner: Runner = DIRECT
    rounded: RoundedWeights = field(default_factory=RoundedWeights)
    suffix: Suffix = field(init=False)

    def __post_init__(self) -> None:
        stop = 0 if self.part.is_last else self.length
        if self.part.start % self.settings.chunk_size or stop % self.settings.chunk_size:
            raise ValueError(
                f"a part of {self.length} tokens from {self.part.start} on does not lie between "
                f"chunks of {self.settings.chunk_size}"
            )
        slots = tuple(suffix_parameters(self.model))
        self.suffix = Suffix(self.model, slots, self.rounded)

    @property
    def length(self) -> int:
        """T."""
        return self.targets.shape[1]

    @property
    def num_chunks(self) -> int:
        """N."""
        return -(-self.length // self.settings.chunk_size)

    @property
    def num_steps(self) -> int:
        """Chunks followed by an inner step: all but the whole sequence's last."""
        return self.num_chunks - 1 if self.part.is_last else self.num_chunks

    @property
    def chunk_weight(self) -> float:
        """The weight of one chunk of one sequence in the loss."""
        in_all = -(-self.part.whole_length(self.length) // self.settings.chunk_size)
        return 1.0 / (in_all * self.targets.shape[0])

    def tokens(self, chunk: int) -> slice:
        """The chunk's positions."""
        start = chunk * self.settings.chunk_size
        return slice(start, min(start + self.settings.chunk_size, self.length))

    def new_kv(self) -> SuffixKV:
        """Empty key and value buffers for the suffix."""
        blocks = self.model.config.num_suffix_layers - 1
        window = self.model.config.window_size
        return SuffixKV(blocks, self.length, window, self._visible(self.part.start))

    def _visible(self, position: int) -> int:
        """How many tokens before this position of the whole sequence a token there can see."""
        window = self.model.config.window_size
        return position if window is None else min(position, window - 1)

    def boundary(
        self, fast: list[Tensor], kv: SuffixKV, like: Tensor, *, after: bool = False
    ) -> Boundary:
        """What crosses this part's start, or its end: `fast`, and views of what lies in `kv`.

        `like` has the keys' dtype and device.
        """
        layers: list[Any] = [block.self_attention for block in self.model.suffix_blocks[1:]]
        shapes = [(len(self.targets), 0, a.num_kv_heads, a.head_dim) for a in layers]
        kv.reserve([KV(like.new_empty(shape), like.new_empty(shape)) for shape in shapes])
        stop = self.length if after else 0
        return Boundary(fast, kv.entries(stop - self._visible(self.part.start + stop), stop))

    def reading(
        self, prefix_output: Tensor, kv: ChunkCache, fast: list[Tensor], chunk: int
    ) -> Reading:
        """What a pass over a chunk reads; views."""
        rows = self.tokens(chunk)
        return Reading(
            x=prefix_output[:, rows],
            rotation=self.rotation[rows],
            targets=self.targets[:, rows],
            token_weights=self.token_weights[:, rows],
            past=kv.past(rows.start),
            fast=fast,
        )
