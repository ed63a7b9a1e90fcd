"""The suffix of a meta step: forward sweep and reverse sweep, chunk by chunk."""

from dataclasses import dataclass

from ttt_megatron.config.schema import MemoryPolicy, RunConfig
from ttt_megatron.planning.static_work import StaticMaps, matrices_in_compute, sweep_maps
from ttt_megatron.planning.units import Sizes, Work, element_bytes, mean_keys, sizes

# Forward products that a policy spares in the reverse sweep.
_SPARED: dict[MemoryPolicy, int] = {"recompute": 0, "save_activations": 1, "save_all": 2}


@dataclass(frozen=True)
class SweepWork:
    """Parts of one chunk, or of all.

    `recompute` needs nothing from later chunks; nothing waits for `weights`, the slow weights'
    gradients; `backward` is the rest of the reverse sweep.
    """

    forward: Work
    recompute: Work
    backward: Work
    weights: Work


@dataclass(frozen=True)
class _Chunk:
    """Counts for one chunk of one sequence, in forward products."""

    config: RunConfig
    sizes: Sizes
    maps: StaticMaps
    tokens: int
    later: int
    keys: float
    own_keys: float
    element: int
    slow_share: float

    def linear(self, elements: float, count: float) -> Work:
        """Products with `elements` matrix elements."""
        return Work(matmul=2.0 * elements * self.tokens * count)

    def attend(self, whole: float, own: float) -> Work:
        """Products of queries with all keys they visit, and with those of the chunk itself."""
        visited = self.keys * whole + self.own_keys * own
        return Work(attention=2.0 * self.sizes.width * self.tokens * self.later * visited)

    def move(self, times: float) -> Work:
        """Passes over the suffix's activations."""
        layers = self.later + 1
        s = self.sizes
        saved = (s.saved + s.saved_prime) * layers - 6 * s.width
        return Work(traffic=saved * self.tokens * self.element * times)

    def fast_bytes(self, a_weight: float) -> Work:
        """Passes over a sequence's fast weights."""
        return Work(traffic=self.sizes.fast * a_weight)

    def slow_casts(self) -> Work:
        """Slow weights in the compute dtype, shared by the sequences of a micro-batch."""
        cast = matrices_in_compute(self.config, self.sizes)
        return Work(traffic=cast * (4 + self.element) * self.slow_share)

    def slow_sums(self) -> Work:
        """Slow weights' gradients, added to their sums, shared likewise."""
        cast = matrices_in_compute(self.config, self.sizes)
        whole = self.maps.matrices + self.sizes.head
        return Work(traffic=(16 * whole + self.element * cast) * self.slow_share)

    def static(self, count: float) -> Work:
        """Products with the static matrices."""
        return self.maps.products(self.config, self.tokens, count)

    def rounded(self, inputs: float, outputs: float, *, for_weights: bool) -> Work:
        """Inputs of the static maps, and cotangents of their outputs, to float8."""
        return self.maps.rounded(
            self.config, self.tokens, inputs=inputs, outputs=outputs, for_weights=for_weights
        )

    @property
    def still(self) -> int:
        """Elements of the first fast matrix, whose input has no tangent and no inner gradient."""
        return 2 * self.sizes.prime // 3


def meta_suffix(config: RunConfig, tile: int, keep_scores: bool) -> SweepWork:
    """Both sweeps over all chunks of one sequence.

    The last chunk takes no inner step: its graph is built once, at the end of the forward sweep.
    """
    model, inner, chunk = config.model, config.inner, config.inner.chunk_size
    chunks = config.data.sequence_length // chunk
    c = _Chunk(
        config=config,
        sizes=sizes(model),
        maps=sweep_maps(config),
        tokens=chunk,
        later=model.num_suffix_layers - 1,
        keys=mean_keys(config.data.sequence_length, model.window_size, min(tile, chunk)),
        own_keys=mean_keys(chunk, model.window_size, tile),
        element=element_bytes(config),
        slow_share=1 / config.training.micro_batch_size,
    )
    scores = 0 if keep_scores else 1
    last = _plain_chunk(c, scores)
    forward = _forward_sweep(c, scores)
    if inner.mode == "meta":
        reverse = _pair_chunk(c, scores, inner.memory_policy)
    else:
        reverse = SweepWork(Work(), last.forward, last.backward, last.weights)
    steps = chunks - 1
    recompute = reverse.recompute * steps
    if inner.two_level and steps:
        size = inner.segment_chunks or default_segment(chunks)
        recompute += forward * ((steps - 1) // size * size)
    return SweepWork(
        # Slow weights are rounded once for all chunks, and for autograd in the last.
        forward=c.slow_casts() + forward * steps + last.forward,
        recompute=recompute,
        backward=reverse.backward * steps + last.backward,
        weights=reverse.weights * steps + last.weights,
    )


def _forward_sweep(c: _Chunk, scores: int) -> Work:
    """Loss, inner gradient and inner step; cached keys need no gradient."""
    work = c.static(2) + c.linear(c.sizes.fast, 3) + c.linear(c.still, -1)
    work += c.rounded(1, 1, for_weights=False)
    work += c.linear(c.sizes.head, 2) + c.attend(4 + scores, 2) + c.move(5)
    # Casts of fast weights and gradient, the norm, the step.
    return work + c.fast_bytes(24 + 2 * c.element)


def _plain_chunk(c: _Chunk, scores: int) -> SweepWork:
    """An ordinary forward and backward pass of a chunk."""
    fast, head = c.sizes.fast, c.sizes.head
    forward = c.static(1) + c.linear(fast + head, 1) + c.attend(2, 0) + c.move(2)
    backward = c.static(1) + c.linear(head, 1) + c.linear(fast, 2) + c.attend(4 + scores, 0)
    weights = c.static(1) + c.linear(head, 1) + c.slow_sums()
    forward += c.rounded(1, 0, for_weights=True)
    backward += c.rounded(0, 1, for_weights=True)
    return SweepWork(
        forward=forward + c.fast_bytes(4 + c.element) + c.slow_casts(),
        recompute=Work(),
        backward=backward + c.move(3) + c.fast_bytes(16 + c.element),
        weights=weights,
    )


def _pair_chunk(c: _Chunk, scores: int, policy: MemoryPolicy) -> SweepWork:
    """A chunk of the reverse sweep: values and tangents, forwards and backwards."""
    spared = _SPARED[policy]
    values = 1 if spared == 0 else 0
    fast, head = c.sizes.fast, c.sizes.head
    recompute = c.static(values) + c.linear(fast, values) + c.linear(head, 1)
    recompute += c.attend(1 + values, 0) + c.move(2 * values)
    recompute += c.rounded(values, 0, for_weights=True)
    backward = c.static(4 - spared - values) + c.linear(fast, 8 - spared - values)
    # Weights' gradients need all inputs and cotangents, whatever products the tape spares.
    backward += c.rounded(2 - values, 2, for_weights=True)
    backward += c.linear(c.still, -3 if spared < 2 else -2) + c.linear(head, 2)
    backward += c.attend(11 - spared - values + 2 * scores, 6 if spared < 2 else 4)
    # Undoing the step, the clip's derivative, casts of fast weights and direction, the new
    # cotangent.
    backward += c.move(8) + c.fast_bytes(56 + 3 * c.element)
    weights = c.static(2) + c.linear(head, 2) + c.slow_sums()
    return SweepWork(Work(), recompute, backward, weights)


def default_segment(chunks: int) -> int:
    """Chunks a segment of two-level checkpointing where none is set: about √N."""
    return max(1, int((max(chunks - 1, 1)) ** 0.5))
