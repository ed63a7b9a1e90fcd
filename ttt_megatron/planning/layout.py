"""Ways to lay a run over processes, which of them the shapes allow, and all that can be tried."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ttt_megatron.config.schema import ContextOrder, MemoryPolicy, RunConfig
from ttt_megatron.config.validate import float8_widths
from ttt_megatron.planning.units import in_float8

POLICIES: tuple[MemoryPolicy, ...] = ("recompute", "save_activations", "save_all")
TURNS = 2
"""Parts of the model a stage of an interleaved pipeline holds, unless a recipe says more."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Tensor × context × pipeline × data processes, and what each keeps in memory."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    context_order: ContextOrder = "1f1b"
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    micro_batch_size: int = 1
    memory_policy: MemoryPolicy = "recompute"
    two_level: bool = False
    recompute_prefix: bool = False
    overlap: bool = False

    @property
    def gpus(self) -> int:
        """Processes in all."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(tensor, context, pipeline, data)."""
        return self.tensor, self.context, self.pipeline, self.data

    @property
    def schedule(self) -> str:
        """The order of micro-batches that training takes under this layout."""
        if self.context == self.pipeline == 1:
            return "in turn"
        if self.virtual_pipeline > 1:
            return "interleaved"
        return self.context_order

    def under(self, schedule: str) -> "Layout":
        """The same with the settings that ask for a schedule."""
        return replace(
            self,
            context_order="zigzag" if schedule == "zigzag" else "1f1b",
            virtual_pipeline=max(self.virtual_pipeline, TURNS) if schedule == "interleaved" else 1,
        )

    def __str__(self) -> str:
        names = ("TP", "CP", "PP", "DP")
        parts = [f"{name}{n}" for name, n in zip(names, self.grid, strict=True) if n > 1]
        return " ".join(parts) or "one process"

    @property
    def choices(self) -> str:
        """What each process keeps, in words."""
        words = [f"{self.micro_batch_size} a micro-batch", self.memory_policy]
        words += ["two-level"] if self.two_level else []
        words += ["recompute prefix"] if self.recompute_prefix else []
        return ", ".join(words)

    def overrides(self) -> list[str]:
        """The settings that ask for this layout."""
        values = {
            "parallel.tensor": self.tensor,
            "parallel.sequence_parallel": self.sequence_parallel,
            "parallel.context": self.context,
            "parallel.context_order": self.context_order,
            "parallel.pipeline": self.pipeline,
            "parallel.virtual_pipeline": self.virtual_pipeline,
            "parallel.data": self.data,
            "parallel.overlap_grad_reduce": self.overlap,
            "parallel.overlap_param_gather": self.overlap,
            "training.micro_batch_size": self.micro_batch_size,
            "training.recompute_prefix": self.recompute_prefix,
            "inner.memory_policy": self.memory_policy,
            "inner.two_level": self.two_level,
        }
        shown = {key: str(value).lower() for key, value in values.items()}
        optional = ("parallel.", "inner.two_level", "training.recompute_prefix")
        return [
            f"{key}={text}"
            for key, text in shown.items()
            if not (key.startswith(optional) and text in ("1", "false", "1f1b"))
        ]

    def applied(self, config: RunConfig) -> RunConfig:
        """The recipe with this layout's micro-batch and memory settings."""
        inner = replace(config.inner, memory_policy=self.memory_policy, two_level=self.two_level)
        if not self.two_level:
            inner = replace(inner, segment_chunks=None)
        training = replace(
            config.training,
            micro_batch_size=self.micro_batch_size,
            recompute_prefix=self.recompute_prefix,
        )
        return replace(config, inner=inner, training=training)

    def micro_batches(self, config: RunConfig) -> int:
        """Micro-batches a step, for each data-parallel replica."""
        return config.training.global_batch_size // (self.data * self.micro_batch_size)


def recipe_layout(config: RunConfig) -> Layout:
    """The layout a recipe asks for."""
    parallel, training = config.parallel, config.training
    return Layout(
        tensor=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        context=parallel.context,
        context_order=parallel.context_order,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        data=parallel.data,
        micro_batch_size=training.micro_batch_size,
        memory_policy=config.inner.memory_policy,
        two_level=config.inner.two_level,
        recompute_prefix=training.recompute_prefix,
        overlap=parallel.overlap_grad_reduce,
    )


def has_inner_steps(config: RunConfig) -> bool:
    """Whether training steps the fast weights."""
    return config.inner.mode in ("meta", "first_order") and config.model.num_suffix_layers > 0


def problem(config: RunConfig, layout: Layout, gpus_per_node: int) -> str | None:
    """Why a run cannot be laid out so, in one clause; None if it can."""
    model, tensor = config.model, layout.tensor
    kv_heads = model.num_kv_heads or model.num_heads
    for name, size in (
        ("model.num_heads", model.num_heads),
        ("key heads", kv_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.prime_ffn_hidden_size", model.prime_ffn_hidden_size or model.ffn_hidden_size),
        ("model.vocab_size", model.vocab_size or 0),
    ):
        if size % tensor:
            return f"tensor = {tensor} does not divide {name} = {size}"
    if tensor > gpus_per_node:
        return f"tensor = {tensor} leaves the node, which has {gpus_per_node} GPUs"
    chunk, tokens = config.inner.chunk_size, config.data.sequence_length
    if layout.sequence_parallel and chunk % tensor:
        return f"tensor = {tensor} does not divide inner.chunk_size = {chunk}"
    if tokens % (layout.context * chunk):
        return f"context = {layout.context} does not cut {tokens // chunk} chunks evenly"
    prefix = model.num_layers - model.num_suffix_layers
    if layout.pipeline - 1 > prefix:
        return f"pipeline = {layout.pipeline} has more stages than the prefix has blocks, {prefix}"
    batch, held = config.training.global_batch_size, layout.data * layout.micro_batch_size
    if batch % held:
        return (
            f"data = {layout.data} times micro_batch_size = {layout.micro_batch_size} does not "
            f"divide the batch of {batch} sequences"
        )
    if in_float8(config):
        return next(float8_widths(model, tensor), None)
    return None


def grids(config: RunConfig, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """All divisions of the GPUs that the shapes allow, at one sequence a micro-batch."""
    for tensor in _divisors(gpus):
        for context in _divisors(gpus // tensor):
            for pipeline in _divisors(gpus // tensor // context):
                layout = Layout(
                    tensor=tensor,
                    sequence_parallel=tensor > 1 and config.inner.chunk_size % tensor == 0,
                    context=context,
                    pipeline=pipeline,
                    data=gpus // tensor // context // pipeline,
                    overlap=True,
                )
                if problem(config, layout, gpus_per_node) is None:
                    yield layout


def variants(config: RunConfig, grid: Layout) -> Iterator[Layout]:
    """What a division of the GPUs can keep in memory, the simplest first."""
    inner_steps = has_inner_steps(config)
    sizes = [n for n in (1, 2, 4, 8) if grid.micro_batches(config) % n == 0]
    for recompute_prefix in (False, True):
        for two_level in (False, True) if inner_steps else (False,):
            for policy in POLICIES if config.inner.mode == "meta" else POLICIES[:1]:
                for size in sizes:
                    yield replace(
                        grid,
                        micro_batch_size=size,
                        memory_policy=policy,
                        two_level=two_level,
                        recompute_prefix=recompute_prefix,
                    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
