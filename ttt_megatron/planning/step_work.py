"""FLOPs and memory traffic of every phase of a step, for one sequence on one process.

Counts are of matrix products: 2·m·n·k each. In units of one forward product a linear map costs 2
in the forward sweep (fast weights 3) and up to 6 (fast 8) in the reverse sweep, where values and
tangents are carried; the memory policies spare one or two of them. Attention is counted in
products of one query with one visited key.
"""

from dataclasses import dataclass

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.planning.mixers import require_known_mixers
from ttt_megatron.planning.static_work import attention_maps, block_maps
from ttt_megatron.planning.suffix_work import meta_suffix
from ttt_megatron.planning.units import Work, element_bytes, mean_keys, sizes


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The phases of one sequence's step. Prefix blocks are given one by one, for cutting.

    `entry_*` is the first suffix block's attention, which runs with the prefix. The reverse sweep
    is `recompute` (needs nothing from later chunks), `suffix_backward` and `suffix_weights` (slow
    weights' gradients, which nothing waits for). Without inner steps the suffix is ordinary.
    """

    block_forward: Work
    block_backward: Work
    block_weights: Work
    entry_forward: Work
    entry_backward: Work
    entry_weights: Work
    suffix_forward: Work
    recompute: Work
    suffix_backward: Work
    suffix_weights: Work
    prefix_blocks: int

    @property
    def phases(self) -> dict[str, Work]:
        """The seven phases over the whole model."""
        blocks = self.prefix_blocks
        return {
            "prefix_forward": self.block_forward * blocks + self.entry_forward,
            "prefix_backward": self.block_backward * blocks + self.entry_backward,
            "prefix_weights": self.block_weights * blocks + self.entry_weights,
            "suffix_forward": self.suffix_forward,
            "recompute": self.recompute,
            "suffix_backward": self.suffix_backward,
            "suffix_weights": self.suffix_weights,
        }

    @property
    def total(self) -> Work:
        """The whole step of one sequence."""
        return sum(self.phases.values(), Work())


def step_work(config: RunConfig, *, tile: int = 128, keep_scores: bool = False) -> StepWork:
    """The work of one sequence. `tile` is attention's queries a tile; with `keep_scores` its
    backward pass over cached keys reads the scores instead of forming them again, as the CPU's
    does (GPU kernels never store them). Raises ValueError for mixers that plans do not know.
    """
    require_known_mixers(config.model)
    model, tokens = config.model, config.data.sequence_length
    element = element_bytes(config)
    keys = mean_keys(tokens, model.window_size, tile)
    s = sizes(model)
    score = 2 * s.width * keys * tokens

    def linear(elements: float, count: float) -> Work:
        return Work(matmul=2.0 * elements * tokens * count)

    def attend(count: float) -> Work:
        return Work(attention=score * count)

    def move(elements: float, times: float) -> Work:
        return Work(traffic=elements * tokens * element * times)

    again = 1 if config.training.recompute_prefix else 0
    body, entered = block_maps(config), attention_maps(config)
    product, of_entry = (maps.products(config, tokens, 1) for maps in (body, entered))
    once = product + body.rounded(config, tokens, inputs=1)
    back = product + body.rounded(config, tokens, outputs=1)
    block = (
        once + attend(2) + move(s.saved, 2),
        back + once * again + attend(5 + 2 * again) + move(s.saved, 3 + 2 * again),
        product,
    )
    meta = config.inner.mode in ("meta", "first_order") and model.num_suffix_layers > 0
    if meta:
        entry = (
            of_entry + entered.rounded(config, tokens, inputs=1) + attend(2) + move(6 * s.width, 2),
            of_entry
            + entered.rounded(config, tokens, outputs=1)
            + attend(5)
            + move(6 * s.width, 3),
            of_entry,
        )
        sweeps = meta_suffix(config, tile, keep_scores)
        suffix = (sweeps.forward, sweeps.recompute, sweeps.backward, sweeps.weights)
    else:
        entry = (Work(), Work(), Work())
        layers = model.num_suffix_layers
        other = s.prime * layers + s.head
        saved = (s.saved + s.saved_prime) * layers
        suffix = (
            once * layers + linear(other, 1) + attend(2 * layers) + move(saved, 2),
            Work(),
            back * layers
            + linear(other, 1)
            + attend(5 * layers)
            + (once + linear(s.prime, 1) + attend(2)) * (again * layers)
            + move(saved, 3 + 2 * again),
            product * layers + linear(other, 1),
        )
    return StepWork(
        block_forward=block[0],
        block_backward=block[1],
        block_weights=block[2],
        entry_forward=entry[0],
        entry_backward=entry[1],
        entry_weights=entry[2],
        suffix_forward=suffix[0],
        recompute=suffix[1],
        suffix_backward=suffix[2],
        suffix_weights=suffix[3],
        prefix_blocks=model.num_layers - model.num_suffix_layers,
    )
