"""Bytes a process holds, by kind. The formulas of docs/memory.md, cut as the layout cuts them."""

from dataclasses import dataclass

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning.layout import Layout, has_inner_steps
from ttt_megatron.planning.suffix_work import default_segment
from ttt_megatron.planning.units import BYTES, sizes

KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "prefix activations",
    "halo",
    "prefix output",
    "weights in compute dtype",
    "fast-weight history",
    "fast weights in use",
    "keys and values",
    "kept by the forward sweep",
    "suffix activations",
    "slow gradients of the sweep",
    "weight gradients put off",
)


@dataclass(frozen=True)
class StageMemory:
    """Bytes by kind: `held` all the time, `shard` for each shard of a micro-batch in flight.

    `debt` is for each shard whose slow weights' gradients are put off: inputs and cotangents of
    its products, as pairs.
    """

    held: dict[str, float]
    shard: dict[str, float]
    debt: float = 0.0

    def at(self, live: int, debts: int = 0) -> dict[str, float]:
        """Bytes by kind with `live` shards in flight, the gradients of `debts` put off."""
        found = {
            kind: self.held.get(kind, 0.0) + self.shard.get(kind, 0.0) * live for kind in KINDS
        }
        found["weight gradients put off"] = self.debt * debts
        return found

    def places(self, limit: float, debts: int = 0) -> int:
        """Shards in flight that fit into `limit` bytes."""
        free = limit - sum(self.held.values()) - self.debt * debts
        return int(free // sum(self.shard.values())) if free > 0 else 0


def history_copies(steps: int, segment: int | None) -> int:
    """Copies of the fast weights kept over `steps` inner steps, at the worst moment.

    One level keeps every step's gradient. Two levels keep the weights at segment starts (all but
    the last) beside one segment's gradients.
    """
    if segment is None or steps <= segment:
        return steps
    segments = -(-steps // segment)
    last = steps - (segments - 1) * segment
    return max(segments - 1 + last, segments - 2 + segment)


def stage_memory(
    config: RunConfig, layout: Layout, stage: int, prefix_blocks: int, shards_a_rank: int = 1
) -> StageMemory:
    """The memory of one pipeline stage's processes; `prefix_blocks` are those it holds.

    A rank holds `shards_a_rank` shards of every sequence (2 with zigzag shards). `config` has
    the layout's settings applied.
    """
    first, last = stage == 0, stage == layout.pipeline - 1
    held = _states(config, layout, prefix_blocks, first, last)
    tokens = config.data.sequence_length // (layout.context * shards_a_rank)
    tokens *= layout.micro_batch_size
    shard = _prefix(config, layout, prefix_blocks, last, tokens)
    if not last:
        return StageMemory(held, shard)
    if has_inner_steps(config):
        for kind, size in _sweeps_held(config, layout).items():
            held[kind] = held.get(kind, 0.0) + size
        shard |= _sweeps_shard(config, layout, tokens, shards_a_rank)
        debt = _put_off(config, layout) * tokens * BYTES[config.training.precision]
        return StageMemory(held, shard, debt)
    shard["prefix activations"] += _plain_suffix(config, layout, tokens)
    return StageMemory(held, shard)


def stage_parameters(
    config: RunConfig, layout: Layout, blocks: int, first: bool, last: bool
) -> float:
    """Parameters a process of a stage holds; gains, which are whole on every one, included."""
    model, s = config.model, sizes(config.model)
    matrices = float(blocks * (s.attention + s.mlp))
    gains = blocks * (4 * s.width + 2 * s.width // model.num_heads)
    if first:
        matrices += s.head
    if last:
        layers = model.num_suffix_layers
        matrices += layers * (s.attention + s.mlp) + s.fast
        gains += layers * (6 * s.width + 2 * s.width // model.num_heads) + s.width
        if not (first and model.tie_embeddings):
            matrices += s.head
    return matrices / layout.tensor + gains


def _master(config: RunConfig) -> int:
    return 8 if config.training.precision == "fp64" else 4


def _states(
    config: RunConfig, layout: Layout, blocks: int, first: bool, last: bool
) -> dict[str, float]:
    size = stage_parameters(config, layout, blocks, first, last) * _master(config)
    return {
        "weights": size,
        "gradients": size,
        # ZeRO-1 over all processes that hold the same weights.
        "optimizer": 2 * size / (layout.data * layout.context),
    }


def _split(layout: Layout, whole: float, parted: float) -> float:
    """Elements on one process: `parted` are cut by tensor parallelism in any case, `whole` only
    with sequence parallelism.
    """
    return (whole / layout.tensor if layout.sequence_parallel else whole) + parted / layout.tensor


def _block(config: RunConfig, layout: Layout) -> float:
    """Elements a token that one block saves."""
    width, ffn = config.model.hidden_size, config.model.ffn_hidden_size
    return _split(layout, 6 * width, 6 * width + 3 * ffn)


def _kv_width(config: RunConfig) -> float:
    model = config.model
    return (model.num_kv_heads or model.num_heads) * (model.hidden_size // model.num_heads)


def _halo_tokens(config: RunConfig, layout: Layout, shards_a_rank: int) -> int:
    """Tokens of keys and values that a shard reads from its left neighbours, at most."""
    if layout.context == 1:
        return 0
    length = config.data.sequence_length
    window = config.model.window_size or length
    return min(window - 1, length - length // (layout.context * shards_a_rank))


def _prefix(
    config: RunConfig, layout: Layout, blocks: int, last: bool, tokens: int
) -> dict[str, float]:
    precision = config.training.precision
    element, width = BYTES[precision], config.model.hidden_size
    block = _block(config, layout)
    entry = 1 if last and has_inner_steps(config) else 0
    whole = _split(layout, 3 * width, 6 * width) * entry
    if config.training.recompute_prefix:
        kept = blocks * _split(layout, width, 0) + (block if blocks else 0)
    else:
        kept = blocks * block
    shards = config.data.sequence_length * layout.micro_batch_size // (layout.context * tokens)
    halo = _halo_tokens(config, layout, shards) * layout.micro_batch_size
    reading = (1 if config.training.recompute_prefix and blocks else blocks) + entry
    s = sizes(config.model)
    casts = (reading * s.attention + (reading - entry) * s.mlp) * element / layout.tensor
    return {
        "prefix activations": (kept + whole) * tokens * element,
        "halo": 2 * _kv_width(config) / layout.tensor * halo * reading * element,
        "prefix output": 2 * width * tokens * element if last else width * tokens * element,
        # Casts of float32 weights stay in the graph until its backward pass.
        "weights in compute dtype": casts if precision in ("bf16", "fp8") else 0.0,
    }


def _plain_suffix(config: RunConfig, layout: Layout, tokens: int) -> float:
    """A suffix without inner steps saves as blocks do."""
    model, element = config.model, BYTES[config.training.precision]
    prime = model.prime_ffn_hidden_size or model.ffn_hidden_size
    block = _block(config, layout) + _split(layout, 4 * model.hidden_size, 3 * prime)
    layers = model.num_suffix_layers
    if config.training.recompute_prefix:
        return (layers * _split(layout, model.hidden_size, 0) + block) * tokens * element
    return layers * block * tokens * element


def _sweeps_held(config: RunConfig, layout: Layout) -> dict[str, float]:
    """What a sweep needs whatever the sequence's length: one chunk as pairs, weights, gradients."""
    model, s, element = config.model, sizes(config.model), BYTES[config.training.precision]
    sequences, layers, later = (
        layout.micro_batch_size,
        model.num_suffix_layers,
        model.num_suffix_layers - 1,
    )
    prime = model.prime_ffn_hidden_size or model.ffn_hidden_size
    tokens = config.inner.chunk_size * sequences
    kept = later * _block(config, layout) + _split(
        layout,
        (4 * layers + 6) * s.width,
        (3 * prime * layers) + 3 * model.ffn_hidden_size,
    )
    fast = s.fast * sequences / layout.tensor
    slow = (later * s.attention + layers * s.mlp + s.head) / layout.tensor
    reduced = config.training.precision in ("bf16", "fp8")
    # The weights, their cotangent, the direction and the chunk's gradient; casts of the first two.
    return {
        "fast weights in use": fast * (4 * _master(config) + (2 * element if reduced else 0)),
        "suffix activations": 2 * kept * tokens * element,
        "slow gradients of the sweep": slow * _master(config),
        "weights in compute dtype": slow * element if reduced else 0.0,
    }


def _sweeps_shard(
    config: RunConfig, layout: Layout, tokens: int, shards_a_rank: int
) -> dict[str, float]:
    """What both sweeps keep of a shard: history, keys and values, products by memory policy."""
    model, inner, s = config.model, config.inner, sizes(config.model)
    element, width = BYTES[config.training.precision], model.hidden_size
    sequences, later = layout.micro_batch_size, model.num_suffix_layers - 1
    chunks = tokens // sequences / inner.chunk_size
    steps = int(chunks) - (1 if layout.context == 1 else 0) or 1
    segment = None
    if inner.two_level:
        segment = inner.segment_chunks or default_segment(int(chunks))
    copies = history_copies(steps, segment)
    taped = min(segment or steps, steps) * inner.chunk_size * sequences
    cached = tokens + _halo_tokens(config, layout, shards_a_rank) * sequences
    return {
        "fast-weight history": s.fast * sequences * copies * _master(config) / layout.tensor,
        "keys and values": 4 * later * _kv_width(config) / layout.tensor * cached * element,
        "kept by the forward sweep": taped * (width + _taped(config, layout)) * element
        + 4.0 * tokens,
    }


def _taped(config: RunConfig, layout: Layout) -> float:
    """Elements a token on the tape: products, and with `save_all` the adjoints of their inputs."""
    model, policy = config.model, config.inner.memory_policy
    if policy == "recompute" or config.inner.mode != "meta":
        return 0.0
    width, ffn = model.hidden_size, model.ffn_hidden_size
    prime = model.prime_ffn_hidden_size or ffn
    layers, later = model.num_suffix_layers, model.num_suffix_layers - 1
    heads = width + 2 * _kv_width(config)
    kept = _split(
        layout,
        later * width + layers * 2 * width,
        later * (heads + width) + layers * (2 * prime + 2 * ffn),
    )
    if policy == "save_all":
        whole = later * width + (layers - 1) * width + layers * width
        kept += _split(layout, whole, later * (heads + width) + layers * (prime + ffn))
    return kept


def _put_off(config: RunConfig, layout: Layout) -> float:
    """Elements a token that the gradients of the suffix's static matrices are formed from."""
    model = config.model
    width, layers = model.hidden_size, model.num_suffix_layers
    attention = 4 * width + 2 * _kv_width(config)
    mlp = 2 * width + 3 * model.ffn_hidden_size
    return 2 * ((layers - 1) * attention + layers * mlp) / layout.tensor
