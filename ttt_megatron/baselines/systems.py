"""The systems that TTT-E2E is compared with (arXiv 2512.23675), made from its own recipe.

Each has the recipe's data, schedule and number of parameters: what its mixers take more or less
than attention, and prime MLPs that it lacks, the static MLPs make up for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ttt_megatron.baselines.counts import count_with_mixers
from ttt_megatron.config.mixers import OutputRule
from ttt_megatron.config.schema import ATTENTION_MIXERS, InnerMode, ModelConfig, RunConfig
from ttt_megatron.config.validate import validate
from ttt_megatron.errors import UserError

_PUBLISHED_STEP = 256
_ROPE_BASES = ((8192, 1e6), (16384, 2e6), (32768, 5e6), (65536, 1e7))
"""Bases of the rotary frequencies that full attention takes for sequences longer than so many
tokens: 1M at 16K, 2M at 32K, 5M at 64K, 10M at 128K."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A system by name: what it is, and the model that it is of a TTT-E2E run."""

    label: str
    text: str
    make: Callable[[RunConfig], RunConfig]


def _mode(mode: InnerMode) -> Callable[[RunConfig], RunConfig]:
    """The same network, its inner steps trained in another way."""

    def make(config: RunConfig) -> RunConfig:
        inner = replace(config.inner, mode=mode, two_level=False, segment_chunks=None)
        training = replace(config.training, cuda_graphs=False)  # those are of inner steps
        return replace(config, inner=inner, training=training)

    return make


def _all_blocks(config: RunConfig) -> RunConfig:
    """Fast weights in every block, as many in all."""
    model = config.model
    prime = model.prime_ffn_hidden_size or model.ffn_hidden_size
    width = max(1, round(prime * model.num_suffix_layers / model.num_layers))
    spread = replace(model, num_suffix_layers=model.num_layers, prime_ffn_hidden_size=width)
    return replace(config, model=_matched(spread, model))


def _plain(**changes: Any) -> Callable[[RunConfig], RunConfig]:
    """A network without prime MLPs; changes are the model's."""

    def make(config: RunConfig) -> RunConfig:
        plain = replace(config.model, num_suffix_layers=0, prime_ffn_hidden_size=None, **changes)
        return _mode("off")(replace(config, model=_matched(plain, config.model)))

    return make


def _full(config: RunConfig) -> RunConfig:
    """Full attention; the rotary base rises with the length, as its distances do."""
    length = config.data.sequence_length
    bases = [base for longest, base in _ROPE_BASES if length > longest]
    return _plain(window_size=None, rope_theta=max([config.model.rope_theta, *bases]))(config)


def _ttt_kvb(output_rule: OutputRule) -> Callable[[RunConfig], RunConfig]:
    """TTT-KVB beside windowed attention in every block, its chunks the inner loop's."""

    def make(config: RunConfig) -> RunConfig:
        chunk, settings = config.inner.chunk_size, config.model.ttt_kvb
        settings = replace(settings, chunk_size=chunk, output_rule=output_rule)
        return _plain(mixers="swa_ttt_kvb", ttt_kvb=settings)(config)

    return make


SYSTEMS: Mapping[str, System] = {
    "e2e": System(label="TTT-E2E", text="the recipe as it is", make=lambda config: config),
    "e2e_all": System(
        label="TTT-E2E, all blocks",
        text="as many fast weights, spread over all blocks",
        make=_all_blocks,
    ),
    "naive": System(
        label="naive TTT",
        text="trained without inner steps, read with them",
        make=_mode("naive"),
    ),
    "off": System(label="no inner steps", text="prime MLPs as ordinary layers", make=_mode("off")),
    "swa": System(label="SWA", text="sliding-window attention in every block", make=_plain()),
    "full": System(label="full attention", text="full attention in every block", make=_full),
    "hybrid": System(
        label="hybrid",
        text="five blocks with sliding windows, one with full attention, and so on",
        make=_plain(mixers="attention,attention,attention,attention,attention,full"),
    ),
    "mamba2": System(
        label="Mamba 2", text="Mamba 2 and SWA in turn", make=_plain(mixers="mamba2,attention")
    ),
    "gated_delta": System(
        label="Gated DeltaNet",
        text="Gated DeltaNet and SWA in turn",
        make=_plain(mixers="gated_delta,attention"),
    ),
    "ttt_kvb": System(
        label="TTT-KVB", text="SWA and TTT-KVB in every block", make=_ttt_kvb("updated")
    ),
    "ttt_kvb_simplified": System(
        label="TTT-KVB, simplified",
        text="the same with the simplified output rule",
        make=_ttt_kvb("simplified"),
    ),
}
"""All systems, by the name that files and commands have for them."""


def as_system(config: RunConfig, name: str, source: str = "configuration") -> RunConfig:
    """A TTT-E2E run as another system.

    Raises UserError, naming `source`, for a name that is none, a run without inner steps of its
    own, and shapes that cannot be.
    """
    if name not in SYSTEMS:
        raise UserError(f"{name} is no system; choose of {', '.join(SYSTEMS)}")
    model = config.model
    if model.num_suffix_layers == 0 or config.inner.mode != "meta" or model.mixers != "attention":
        raise UserError(
            f"{source}: systems are made from a TTT-E2E run, and this one has inner.mode = "
            f"{config.inner.mode}, model.num_suffix_layers = {model.num_suffix_layers}, "
            f"model.mixers = {model.mixers}; give a recipe with meta, a suffix and attention"
        )
    made = SYSTEMS[name].make(config)
    validate(made, f"{source} as {name}")
    return made


def _matched(model: ModelConfig, goal: ModelConfig) -> ModelConfig:
    """The model with static MLPs so wide that it has about as many parameters as `goal`."""
    least = count_with_mixers(replace(model, ffn_hidden_size=1)).total
    wanted = count_with_mixers(goal).total
    width = 1 + (wanted - least) / (3 * model.hidden_size * model.num_layers)
    if width < 1:
        raise UserError(
            f"model.mixers = {model.mixers} has {least:,} parameters without any MLP, more than "
            f"the {wanted:,} it is to equal; widen model.ffn_hidden_size of the recipe"
        )
    return replace(model, ffn_hidden_size=_rounded(width, model))


def _rounded(width: float, model: ModelConfig) -> int:
    """A width near this one that suits kernels; published baselines' are multiples of 256."""
    published = set(model.mixer_kinds) <= set(ATTENTION_MIXERS) and not model.num_suffix_layers
    if published and width >= 8 * _PUBLISHED_STEP:
        return int(width - width % _PUBLISHED_STEP)
    step = 64 if width >= 512 else 8
    return max(step, round(width / step) * step)
