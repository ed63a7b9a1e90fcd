"""megatron-core's tensor-parallel layers in the model's slots.

Weights, their partition and their attributes are mcore's; the product runs through the model's
operations, so that a layer takes tensors and pairs alike. With sequence parallelism, what lies
between the layers holds a rank's own tokens only.
"""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ttt_kernels.linear_cross_entropy.shard import VocabularyShard
from ttt_megatron.model import ops
from ttt_megatron.model.head import Head
from ttt_megatron.model.ops import Operand
from ttt_megatron.model.slots import RMSNorm, Slots, static_product
from ttt_megatron.parallel import regions
from ttt_megatron.parallel.shards import take_part, whole_shape


def _leave_uninitialised(weight: Tensor) -> None:
    """The learner draws all parameters itself."""


def _mark_cut(weight: Tensor, axis: int) -> None:
    """What mcore tells cut weights by; it marks only those that it initialises."""
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)


class ColumnLinear(ColumnParallelLinear):
    """A linear whose outputs are cut; weight [out/R, in]."""

    def __init__(self, in_features: int, out_features: int, *, config: TransformerConfig) -> None:
        super().__init__(
            in_features,
            out_features,
            config=config,
            init_method=_leave_uninitialised,
            bias=False,
            gather_output=False,
        )
        _mark_cut(self.weight, 0)
        self._sequence_parallel = config.sequence_parallel
        self.float8: nn.Module | None = None

    def forward(self, x: Operand) -> Operand:
        """[b, T, in] (own tokens with sequence parallelism) → [b, T, out/R]."""
        return static_product(self.enter(x), self.weight, self.float8)

    def enter(self, x: Operand) -> Operand:
        """All tokens, whose gradient is summed over the parts."""
        return _enter(x, self.tp_group, self._sequence_parallel)

    def leave(self, out: Operand) -> Operand:
        """The part's own outputs."""
        return out


class RowLinear(RowParallelLinear):
    """A linear whose inputs are cut; weight [out, in/R]."""

    def __init__(self, in_features: int, out_features: int, *, config: TransformerConfig) -> None:
        super().__init__(
            in_features,
            out_features,
            config=config,
            init_method=_leave_uninitialised,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        _mark_cut(self.weight, 1)
        self._sequence_parallel = config.sequence_parallel
        self.float8: nn.Module | None = None

    def forward(self, x: Operand) -> Operand:
        """[b, T, in/R] → [b, T, out] (own tokens with sequence parallelism)."""
        return self.leave(static_product(x, self.weight, self.float8))

    def enter(self, x: Operand) -> Operand:
        """The part's own inputs."""
        return x

    def leave(self, out: Operand) -> Operand:
        """The sum over the parts, of own tokens only with sequence parallelism."""
        function = regions.sum_own_tokens if self._sequence_parallel else regions.sum_of_parts
        return ops.map_tokens(out, partial(function, group=self.tp_group))


class VocabEmbedding(VocabParallelEmbedding):
    """A token embedding cut by vocabulary; weight [V/R, H]."""

    def __init__(self, vocab_size: int, width: int, *, config: TransformerConfig) -> None:
        super().__init__(vocab_size, width, init_method=_leave_uninitialised, config=config)
        _mark_cut(self.weight, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, T] int64 → [b, T, H], all tokens."""
        row = tokens - self.vocab_start_index
        inside = (row >= 0) & (row < self.weight.shape[0])
        found = torch.nn.functional.embedding(torch.where(inside, row, 0), self.weight)
        return regions.sum_of_parts(found * inside.unsqueeze(-1), self.tp_group)


def _enter(x: Operand, group: ProcessGroup, sequence_parallel: bool) -> Operand:
    if sequence_parallel:
        return ops.map_tokens(x, partial(regions.gather_tokens, group=group, partial=True))
    return ops.map_tokens(x, partial(regions.copy_to_parts, group=group))


class VocabHead(Head):
    """The output head cut by vocabulary."""

    def __init__(self, group: ProcessGroup, rows: int, sequence_parallel: bool) -> None:
        super().__init__(
            VocabularyShard(
                first=rows * group.rank(),
                largest=rows,
                reduce_max=partial(regions.max_over, group=group),
                reduce_sum=partial(regions.sum_over, group=group),
            )
        )
        object.__setattr__(self, "_group", group)
        object.__setattr__(self, "_sequence_parallel", sequence_parallel)

    _group: ProcessGroup
    _sequence_parallel: bool

    def enter(self, hidden: Operand) -> Operand:
        """All tokens; the gradient is summed over the parts of the vocabulary."""
        return _enter(hidden, self._group, self._sequence_parallel)

    def whole(self, logits: Tensor) -> Tensor:
        """[b, T, V/R] → [b, T, V]."""
        return regions.join(logits, -1, self._group)


def tensor_parallel_slots(config: TransformerConfig, vocab_size: int) -> Slots:
    """Slots for this rank of the tensor-parallel group mcore has set up."""
    group = parallel_state.get_tensor_model_parallel_group()
    size, sequence_parallel = group.size(), config.sequence_parallel

    def norm(width: int, eps: float) -> RMSNorm:
        layer = RMSNorm(width, eps)
        # Each rank's gradient covers its own tokens; finalize_model_grads sums over the group.
        layer.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        return layer

    slots = Slots(
        column=partial(ColumnLinear, config=config),
        row=partial(RowLinear, config=config),
        norm=norm,
        embedding=partial(VocabEmbedding, config=config),
        head=VocabHead(group, vocab_size // size, sequence_parallel),
        parts=size,
        sum_parts=partial(regions.sum_over, group=group),
        whole_shape=partial(whole_shape, size=size),
        take_part=partial(take_part, rank=group.rank(), size=size),
    )
    if not sequence_parallel:
        return slots
    return Slots(
        **{name: getattr(slots, name) for name in slots.__dataclass_fields__}
        | {
            "all_tokens": partial(regions.gather_tokens, group=group, partial=False),
            "own_tokens": partial(regions.own_tokens, group=group),
        }
    )
