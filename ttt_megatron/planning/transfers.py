"""Bytes that a process sends in a step, by kind, and the links they take."""

from dataclasses import dataclass

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning.hardware import Hardware
from ttt_megatron.planning.layout import Layout, has_inner_steps
from ttt_megatron.planning.units import element_bytes, sizes

LATENCY = 10e-6
"""Seconds that starting a transfer or a collective takes."""


@dataclass(frozen=True)
class Links:
    """Bytes a second that a process reaches in each of its groups."""

    tensor: float
    context: float
    pipeline: float
    data: float


def links(layout: Layout, hardware: Hardware) -> Links:
    """Ranks are numbered tensor first, then context, data, pipeline: near ranks share a node."""

    def speed(span: int) -> float:
        inside = span <= hardware.gpus_per_node
        peak = hardware.nvlink_gbs if inside else hardware.network_gbs
        return peak * 1e9 * hardware.link_efficiency

    return Links(
        tensor=speed(layout.tensor),
        context=speed(layout.tensor * layout.context),
        pipeline=speed(layout.gpus),
        data=speed(layout.tensor * layout.context * layout.data),
    )


@dataclass(frozen=True, kw_only=True)
class TensorTraffic:
    """Bytes and number of tensor-parallel reductions of one micro-batch, in each phase.

    A reduction counts 2(n−1)/n times the tensor: the same for an all-reduce as for sequence
    parallelism's gather and scatter.
    """

    block: tuple[float, int]
    entry: tuple[float, int]
    suffix_forward: tuple[float, int]
    recompute: tuple[float, int]
    suffix_backward: tuple[float, int]


def tensor_traffic(config: RunConfig, layout: Layout) -> TensorTraffic:
    """Reductions on a process that holds 1/context of the micro-batch's tokens.

    `block` and `entry` are one direction's. `config` has the layout's settings applied.
    """
    model, n = config.model, layout.tensor
    tokens = config.data.sequence_length // layout.context * layout.micro_batch_size
    size = tokens * model.hidden_size * element_bytes(config)
    one = size * 2 * (n - 1) / n
    layers = model.num_suffix_layers
    if not has_inner_steps(config):
        forward = (3 * layers * one, 3 * layers)
        return TensorTraffic(
            block=(2 * one, 2),
            entry=(0.0, 0),
            suffix_forward=forward,
            recompute=(0.0, 0),
            suffix_backward=forward,
        )
    chunks = config.data.sequence_length // layout.context // config.inner.chunk_size
    sublayers = 3 * layers - 1
    values = 1 if config.inner.memory_policy == "recompute" else 0
    # Values and tangents go through one reduction of twice the size.
    reverse = (4 - values) * sublayers + 2
    if config.inner.mode != "meta":
        values, reverse = 0, sublayers + 1
    return TensorTraffic(
        block=(2 * one, 2),
        entry=(one, 1),
        suffix_forward=((2 * sublayers + 1) * one, (2 * sublayers + 1) * chunks),
        recompute=(values * sublayers * one, values * sublayers * chunks),
        suffix_backward=(reverse * one, 2 * sublayers * chunks),
    )


def halo_layers(config: RunConfig, blocks: int, last: bool) -> int:
    """Attention layers over whole shards on a stage that holds `blocks` prefix blocks."""
    if has_inner_steps(config):
        return blocks + (1 if last else 0)
    return blocks + (config.model.num_suffix_layers if last else 0)


def halo_of(config: RunConfig, layout: Layout, tokens: int) -> float:
    """Keys and values of one attention layer and micro-batch: of `tokens`, as far as seen."""
    model = config.model
    seen = min((model.window_size or config.data.sequence_length) - 1, tokens)
    kv_width = (model.num_kv_heads or model.num_heads) * (model.hidden_size // model.num_heads)
    element = element_bytes(config)
    return 2.0 * seen * layout.micro_batch_size * kv_width * element / layout.tensor


def state_of(config: RunConfig, layout: Layout, tokens: int) -> float:
    """Fast weights and the suffix's keys and values that `tokens` tokens leave behind."""
    if not has_inner_steps(config):
        return 0.0
    master = 8 if config.training.precision == "fp64" else 4
    fast = sizes(config.model).fast * layout.micro_batch_size * master / layout.tensor
    return fast + (config.model.num_suffix_layers - 1) * halo_of(config, layout, tokens)


def halo_bytes(config: RunConfig, layout: Layout, shards_a_rank: int) -> float:
    """Keys and values that a rank sends for one attention layer and micro-batch, one direction."""
    if layout.context == 1:
        return 0.0
    length, shards = config.data.sequence_length, layout.context * shards_a_rank
    return shards_a_rank * halo_of(config, layout, length - length // shards)


def relay_bytes(config: RunConfig, layout: Layout) -> float:
    """Fast weights and the suffix's keys and values that one shard hands to the next.

    The cotangents that come back are as many.
    """
    if layout.context == 1:
        return 0.0
    length = config.data.sequence_length
    return state_of(config, layout, length - length // layout.context)


def boundary_bytes(config: RunConfig, layout: Layout) -> float:
    """Hidden states of a micro-batch's shard that cross a stage boundary, one direction."""
    if layout.pipeline == 1:
        return 0.0
    tokens = config.data.sequence_length // layout.context * layout.micro_batch_size
    size = float(tokens * config.model.hidden_size * element_bytes(config))
    return size / layout.tensor if layout.sequence_parallel else size


def reduction_bytes(layout: Layout, parameter_bytes: float) -> float:
    """What a process sends to scatter its gradients' sum; gathering parameters sends as much."""
    copies = layout.data * layout.context
    return parameter_bytes * (copies - 1) / copies
