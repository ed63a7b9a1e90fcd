"""What both sweeps work on: a batch of sequences after the prefix, cut into chunks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttt_megatron.config.schema import MemoryPolicy
from ttt_megatron.meta.substitute import ParameterSlot, suffix_parameters
from ttt_megatron.meta.suffix_kv import SuffixKV
from ttt_megatron.model import ops
from ttt_megatron.model.attention import KV
from ttt_megatron.model.ops import Operand
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
    """A batch of sequences of which the prefix has been run.

    targets [b, T] int64; token_weights [b, T]: see `chunk_token_weights`; chunk losses weigh
    1/(N·b) each in the loss.
    """

    model: LanguageModel
    settings: InnerSettings
    targets: Tensor
    token_weights: Tensor
    rotation: Tensor
    slots: list[ParameterSlot] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = suffix_parameters(self.model)

    @property
    def length(self) -> int:
        """T."""
        return self.targets.shape[1]

    @property
    def num_chunks(self) -> int:
        """N."""
        return -(-self.length // self.settings.chunk_size)

    @property
    def chunk_weight(self) -> float:
        """The weight of one chunk of one sequence in the loss."""
        return 1.0 / (self.num_chunks * self.targets.shape[0])

    def tokens(self, chunk: int) -> slice:
        """The chunk's positions."""
        start = chunk * self.settings.chunk_size
        return slice(start, min(start + self.settings.chunk_size, self.length))

    def new_kv(self) -> SuffixKV:
        """Empty key and value buffers for the suffix."""
        blocks = self.model.config.num_suffix_layers - 1
        return SuffixKV(blocks, self.length, self.model.config.window_size)

    def run_suffix(
        self, chunk: int, x: Operand, past: list[KV | None], fast: list
    ) -> tuple[Operand, list[KV]]:
        """The suffix over one chunk's slice of the prefix output."""
        own = ops.map_tokens(x, self.model.slots.own_tokens)
        return self.model.suffix(own, self.rotation[self.tokens(chunk)], past, fast)
