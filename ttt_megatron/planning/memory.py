"""Bytes a process holds, by kind. The formulas of docs/memory.md, cut as the layout cuts them."""

from dataclasses import dataclass

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning.layout import Layout, has_inner_steps
from ttt_megatron.planning.static_work import block_maps, matrices_in_compute, sweep_maps
from ttt_megatron.planning.suffix_work import default_segment
from ttt_megatron.planning.transfers import halo_layers
from ttt_megatron.planning.units import compute_precision, element_bytes, in_float8, sizes

KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "prefix activations",
    "cotangents of a block",
    "halo",
    "prefix output",
    "weights in compute dtype",
    "weights in float8",
    "fast-weight history",
    "fast weights in use",
    "keys and values",
    "kept by the forward sweep",
    "suffix activations",
    "attention scores",
    "slow gradients of the sweep",
    "weight gradients put off",
    "messages under way",
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


@dataclass(frozen=True)
class Shard:
    """One of the `number` shards of every sequence: the one at `index`, or None for the most that
    any of them takes.
    """

    number: int = 1
    index: int | None = None

    def past(self, config: RunConfig) -> int:
        """Tokens of keys and values that it reads from shards to its left."""
        if self.number == 1:
            return 0
        length = config.data.sequence_length
        index = self.number - 1 if self.index is None else self.index
        return min((config.model.window_size or length) - 1, length // self.number * index)

    def steps(self, chunks: int) -> int:
        """Inner steps in its `chunks` chunks: none follows the sequence's last one."""
        whole = self.number == 1 or self.index == self.number - 1
        return chunks - 1 if whole else chunks


def stage_memory(
    config: RunConfig,
    layout: Layout,
    stage: int,
    prefix_blocks: int,
    shards_a_rank: int = 1,
    *,
    index: int | None = None,
    keep_scores: bool = False,
) -> StageMemory:
    """The memory of one pipeline stage's processes; `prefix_blocks` are those it holds.

    A rank holds `shards_a_rank` shards of every sequence (2 with zigzag shards); `index` counts
    one of them, None the most that any takes. With `keep_scores` attention keeps its scores where
    cached keys are read, as the CPU's does (GPU kernels never store them). `config` has the
    layout's settings applied.
    """
    first, last = stage == 0, stage == layout.pipeline - 1
    part = Shard(layout.context * shards_a_rank, index)
    held = _states(config, layout, prefix_blocks, first, last)
    tokens = config.data.sequence_length // part.number * layout.micro_batch_size
    shard = _prefix(config, layout, prefix_blocks, last, tokens, part)
    if keep_scores:
        shard["attention scores"] = _shard_scores(config, layout, prefix_blocks, last, part)
    if not (last and has_inner_steps(config)):
        held["cotangents of a block"] = _cotangents(config, layout, tokens, part, keep_scores)
    if not last:
        return StageMemory(held, shard)
    if has_inner_steps(config):
        for kind, size in _sweeps_held(config, layout).items():
            held[kind] = held.get(kind, 0.0) + size
        if keep_scores:
            held["attention scores"] = _chunk_scores(config, layout)
        shard |= _sweeps_shard(config, layout, tokens, part)
        debt = _put_off(config, layout) * tokens
        return StageMemory(held, shard, debt)
    shard["prefix activations"] += _plain_suffix(config, layout, tokens)
    return StageMemory(held, shard)


def stage_parameters(
    config: RunConfig, layout: Layout, blocks: int, first: bool, last: bool
) -> float:
    """Parameters a process of a stage holds; gains, which are whole on every one, included."""
    model, s = config.model, sizes(config.model)
    matrices = float(blocks * (s.attention + s.mlp))
    gains = blocks * s.gains
    if first:
        matrices += s.head
    if last:
        layers = model.num_suffix_layers
        matrices += layers * (s.attention + s.mlp) + s.fast
        gains += layers * (s.gains + 2 * s.width) + s.width
        if not (first and model.tie_embeddings):
            matrices += s.head
    return matrices / layout.tensor + gains


def static_weights(config: RunConfig, layout: Layout, blocks: int, last: bool) -> float:
    """Elements of the matrices of static linear maps that a process of a stage holds."""
    if last:
        blocks += config.model.num_suffix_layers
    return blocks * block_maps(config).matrices / layout.tensor


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
        # Once for the output and once, transposed, for the input's gradient.
        "weights in float8": 2 * static_weights(config, layout, blocks, last)
        if in_float8(config)
        else 0.0,
    }


def _split(layout: Layout, whole: float, parted: float) -> float:
    """Elements on one process: `parted` are cut by tensor parallelism in any case, `whole` only
    with sequence parallelism.
    """
    return (whole / layout.tensor if layout.sequence_parallel else whole) + parted / layout.tensor


def _block(config: RunConfig, layout: Layout) -> float:
    """Bytes a token that one block saves; with sequence parallelism the inputs of the first
    matrices of attention and MLP are kept gathered.
    """
    width, ffn = config.model.hidden_size, config.model.ffn_hidden_size
    # Without norms of queries and keys no less is kept: the values' memory is theirs too.
    norms = 4 if config.model.post_norm else 2
    elements = 2 * width + _split(layout, norms * width, 6 * width + 3 * ffn)
    return elements * element_bytes(config) - _spared(config, layout, 1, 1)


def _spared(config: RunConfig, layout: Layout, attentions: float, mlps: float) -> float:
    """Bytes a token by which layers save less where inputs of linear maps are kept in float8.

    proj's input is kept both ways: attention needs its output.
    """
    if not in_float8(config):
        return 0.0
    width, ffn, less = config.model.hidden_size, config.model.ffn_hidden_size, element_bytes(config)
    less -= 1
    return attentions * (width * less - width / layout.tensor) + mlps * less * (
        width + ffn / layout.tensor
    )


def _kv_width(config: RunConfig) -> float:
    model = config.model
    return (model.num_kv_heads or model.num_heads) * (model.hidden_size // model.num_heads)


def _scores(config: RunConfig, layout: Layout, part: Shard) -> tuple[float, float]:
    """Scores of a layer that reads a whole shard tile by tile, as the CPU's attention does: all of
    them, and those formed at once.
    """
    length, past = config.data.sequence_length // part.number, part.past(config)
    window = config.model.window_size or config.data.sequence_length
    rows = 256 if window >= 256 else max(32, 1 << (window - 1).bit_length())
    tiles = [
        min(rows, length - start) * (min(start + rows, length) - max(-past, start - window + 1))
        for start in range(0, length, rows)
    ]
    matrices = layout.micro_batch_size * config.model.num_heads / layout.tensor
    every = sum(tiles) * matrices
    # Equal tiles go together up to a limit, but not where they reach over the shard's start.
    together = max(tiles) * matrices
    return every, together if past else min(every, max(together, 1 << 20))


def _shard_scores(config: RunConfig, layout: Layout, blocks: int, last: bool, part: Shard) -> float:
    """Probabilities of every layer that reads a halo, until its backward pass."""
    if not part.past(config):
        return 0.0
    return 4.0 * _scores(config, layout, part)[0] * _reading(config, blocks, last)


def _cotangents(
    config: RunConfig, layout: Layout, tokens: int, part: Shard, keep_scores: bool
) -> float:
    """What the backward pass of one prefix block has at hand."""
    width, ffn = config.model.hidden_size, config.model.ffn_hidden_size
    attention, mlp = _split(layout, 2 * width, 10 * width), _split(layout, 2 * width, 3 * ffn)
    size = tokens * element_bytes(config)
    if keep_scores:
        # Probabilities, their cotangents and those of the scores.
        return attention * size + 12.0 * _scores(config, layout, part)[1]
    return max(attention, mlp) * size


def _chunk_scores(config: RunConfig, layout: Layout) -> float:
    """Probabilities of one chunk's pair pass and their tangents, in one layer at a time."""
    model, chunk = config.model, config.inner.chunk_size
    if model.num_suffix_layers == 1:
        return 0.0
    window = model.window_size or config.data.sequence_length
    seen = chunk * min(chunk + window - 1, config.data.sequence_length)
    layers = model.num_suffix_layers - 1
    return 8.0 * seen * layers * model.num_heads / layout.tensor * layout.micro_batch_size


def _reading(config: RunConfig, blocks: int, last: bool) -> int:
    """Attention layers over whole shards whose inputs are kept."""
    entry = 1 if last and has_inner_steps(config) else 0
    return (1 if config.training.recompute_prefix and blocks else blocks) + entry


def _prefix(
    config: RunConfig, layout: Layout, blocks: int, last: bool, tokens: int, part: Shard
) -> dict[str, float]:
    element, width = element_bytes(config), config.model.hidden_size
    block = _block(config, layout)
    entry = 1 if last and has_inner_steps(config) else 0
    norms = 2 if config.model.post_norm else 1
    whole = (width + _split(layout, norms * width, 6 * width)) * element * entry
    whole -= _spared(config, layout, entry, 0)
    if config.training.recompute_prefix:
        kept = blocks * _split(layout, width, 0) * element + (block if blocks else 0)
    else:
        kept = blocks * block
    # What was received is kept also where a block's activations are not.
    halo, received = part.past(config) * layout.micro_batch_size, halo_layers(config, blocks, last)
    reading = _reading(config, blocks, last)
    s = sizes(config.model)
    casts = (reading * s.attention + (reading - entry) * s.mlp) * element / layout.tensor
    return {
        "prefix activations": (kept + whole) * tokens,
        "halo": 2 * _kv_width(config) / layout.tensor * halo * received * element,
        "prefix output": 2 * width * tokens * element if last else width * tokens * element,
        # Casts of float32 weights stay in the graph until its backward pass.
        "weights in compute dtype": casts if _casts(config) and not in_float8(config) else 0.0,
    }


def _plain_suffix(config: RunConfig, layout: Layout, tokens: int) -> float:
    """A suffix without inner steps saves as blocks do."""
    model, element = config.model, element_bytes(config)
    prime = model.prime_ffn_hidden_size or model.ffn_hidden_size
    block = _block(config, layout) + _split(layout, 4 * model.hidden_size, 3 * prime) * element
    layers = model.num_suffix_layers
    if config.training.recompute_prefix:
        return (layers * _split(layout, model.hidden_size, 0) * element + block) * tokens
    return layers * block * tokens


def _sweeps_held(config: RunConfig, layout: Layout) -> dict[str, float]:
    """What a sweep needs whatever the sequence's length: one chunk as pairs, weights, gradients."""
    model, s, element = config.model, sizes(config.model), element_bytes(config)
    sequences, layers, later = (
        layout.micro_batch_size,
        model.num_suffix_layers,
        model.num_suffix_layers - 1,
    )
    prime = model.prime_ffn_hidden_size or model.ffn_hidden_size
    tokens = config.inner.chunk_size * sequences
    other = _split(
        layout,
        (4 * layers + 6) * s.width,
        (3 * prime * layers) + 3 * model.ffn_hidden_size,
    )
    kept = later * _block(config, layout) + other * element - _spared(config, layout, 0, 1)
    fast = s.fast * sequences / layout.tensor
    slow = (sweep_maps(config).matrices + s.head) / layout.tensor
    reduced = _casts(config)
    cast = matrices_in_compute(config, s) / layout.tensor
    # The weights, their cotangent, the direction and the chunk's gradient; casts of the first two.
    return {
        "fast weights in use": fast * (4 * _master(config) + (2 * element if reduced else 0)),
        "suffix activations": 2 * kept * tokens,
        "slow gradients of the sweep": slow * _master(config),
        "weights in compute dtype": cast * element if reduced else 0.0,
    }


def _sweeps_shard(config: RunConfig, layout: Layout, tokens: int, part: Shard) -> dict[str, float]:
    """What both sweeps keep of a shard: history, keys and values, products by memory policy."""
    model, inner, s = config.model, config.inner, sizes(config.model)
    element, width = element_bytes(config), model.hidden_size
    sequences, later = layout.micro_batch_size, model.num_suffix_layers - 1
    chunks = tokens // sequences // inner.chunk_size
    steps = part.steps(chunks)
    segment = None
    if inner.two_level:
        segment = inner.segment_chunks or default_segment(chunks)
    copies = history_copies(steps, segment)
    taped = min(segment or steps, steps) * inner.chunk_size * sequences
    cached = tokens + part.past(config) * sequences
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


def _casts(config: RunConfig) -> bool:
    """Whether the compute dtype is another than that of the weights."""
    return compute_precision(config) == "bf16"


def _put_off(config: RunConfig, layout: Layout) -> float:
    """Bytes a token that the gradients of the suffix's static matrices and of the head are
    formed from: inputs and cotangents of their products, as pairs.
    """
    model, tensor = config.model, layout.tensor
    width, layers = model.hidden_size, model.num_suffix_layers
    attention = 2 * width + (2 * width + 2 * _kv_width(config)) / tensor
    mlp = 2 * width + 3 * model.ffn_hidden_size / tensor
    head = width + (model.vocab_size or 0) / tensor
    element = element_bytes(config)
    of_maps = 1 if in_float8(config) else element
    return 2 * (((layers - 1) * attention + layers * mlp) * of_maps + head * element)
