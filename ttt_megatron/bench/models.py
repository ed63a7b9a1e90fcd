"""The models that are compared: TTT-E2E, and baselines of as many parameters."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ttt_megatron.bench.planned import no_less
from ttt_megatron.config import from_dict, load_recipe, validate
from ttt_megatron.config.schema import MemoryPolicy, Precision, RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.meta.chunk_graph import ChunkPrograms
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.passes import DIRECT
from ttt_megatron.planning.layout import Layout
from ttt_megatron.planning.rank_memory import rank_memory
from ttt_megatron.training.float8 import float8_products
from ttt_megatron.training.weights import build_learner

E2E, SWA, FULL = "TTT-E2E", "SWA", "full attention"
TINY = "tiny"
_TINY: dict[str, Any] = {
    "name": TINY,
    "model": {
        "vocab_size": 512,
        "num_layers": 4,
        "num_suffix_layers": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "ffn_hidden_size": 256,
        "window_size": 256,
    },
    "inner": {"chunk_size": 128},
    "data": {"sequence_length": 512},
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model by name, as its recipe trains it."""

    name: str
    config: RunConfig

    def at(self, length: int, precision: str) -> RunConfig:
        """One sequence of `length` tokens."""
        config = self.config
        return replace(
            config,
            data=replace(config.data, sequence_length=length),
            training=replace(
                config.training,
                precision=precision,  # type: ignore[arg-type]
                cuda_graphs=False,
                micro_batch_size=1,
                global_batch_size=1,
            ),
            parallel=type(config.parallel)(),
            inner=replace(config.inner, mode="meta"),
        )


def recipes_folder() -> Path:
    """`recipes/` of a source checkout, or of the current folder."""
    beside_package = Path(__file__).resolve().parents[2] / "recipes"
    for folder in (beside_package, Path.cwd() / "recipes"):
        if any(folder.glob("*/base.yaml")):
            return folder
    raise UserError(
        f"there is no {beside_package} and no recipes/ here: give --recipe FILE in place of --sizes"
    )


def published_sizes() -> dict[str, Path]:
    """Sizes that have a recipe for pre-training at 8K, by name."""
    found = sorted(recipes_folder().glob("*/pretrain-e2e-8k.yaml"))
    return {path.parent.name: path for path in found}


def named_sizes(names: Sequence[str]) -> list[Size]:
    """The published sizes of these names; UserError for another."""
    known = published_sizes()
    for name in names:
        if name not in known:
            raise UserError(f"--sizes {name}: the sizes are {', '.join(known)}; choose of them")
    return [Size(name=name, config=load_recipe(known[name])) for name in names]


def recipe_size(path: str) -> Size:
    """The model of a recipe; UserError if it has no prime MLPs or no vocabulary."""
    config = load_recipe(path)
    if config.model.vocab_size is None:
        raise UserError(f"{path}: model.vocab_size is not set, and bench reads no data: set it")
    if config.model.num_suffix_layers == 0:
        raise UserError(
            f"{path}: model.num_suffix_layers = 0 leaves nothing to step: give a recipe with a "
            "suffix; baselines are made from it"
        )
    return Size(name=config.name, config=config)


def tiny_size() -> Size:
    """A model for two CPU cores."""
    return Size(name=TINY, config=from_dict(_TINY))


def tiny_with_all_systems() -> Size:
    """One of six blocks, as the hybrid needs, and of MLPs wide enough for all mixers to match."""
    name = f"{TINY}-6"
    model = _TINY["model"] | {"num_layers": 6, "ffn_hidden_size": 320}
    return Size(name=name, config=from_dict(_TINY | {"name": name, "model": model}))


def with_memory(
    config: RunConfig, *, policy: MemoryPolicy = "recompute", prefix: bool, two_level: bool
) -> RunConfig:
    """Choices of what is kept; without inner steps there is but the prefix's."""
    steps = config.inner.mode == "meta"
    return replace(
        config,
        inner=replace(
            config.inner,
            memory_policy=policy,
            two_level=two_level and steps,
            segment_chunks=None,
        ),
        training=replace(config.training, recompute_prefix=prefix),
    )


def weight_bytes(config: RunConfig, device: torch.device) -> float:
    """Of the parameters."""
    return _memory(config, device)["weights"]


def step_bytes(config: RunConfig, device: torch.device) -> float:
    """Of one forward and backward pass: all kinds but the optimizer's state."""
    kinds = _memory(config, device)
    return sum(size for kind, size in kinds.items() if kind != "optimizer")


def _memory(config: RunConfig, device: torch.device) -> dict[str, float]:
    return rank_memory(no_less(config) or config, Layout(), on_cpu=device.type == "cpu")[0]


def on(config: RunConfig, device: torch.device) -> RunConfig:
    """The same on this kind of device, which products in float8 ask for."""
    kind: Any = device.type
    return replace(config, training=replace(config.training, device=kind))


def make(config: RunConfig, device: torch.device) -> Learner:
    """A fresh learner on the device."""
    return build_learner(on(config, device)).to(device)


def sharing(learner: Learner, config: RunConfig, *, graphs: bool = False) -> Learner:
    """A learner with the same parameters and another configuration's inner loop and recompute.

    With `graphs` the passes over its chunks are replayed as CUDA graphs.
    """
    twin = copy.copy(learner)
    twin.runner = ChunkPrograms() if graphs else DIRECT
    twin.inner = config.inner
    twin.recompute_prefix = config.training.recompute_prefix
    return twin


def check_length(size: Size, length: int, precision: Precision, device: torch.device) -> None:
    """UserError unless whole chunks make a sequence of this length, and the device has float8."""
    chunk = size.config.inner.chunk_size
    if length < chunk or length % chunk:
        raise UserError(
            f"--lengths {length}: it is no multiple of the {chunk} tokens of a chunk of "
            f"{size.name}; choose one"
        )
    config = on(size.at(length, precision), device)
    validate(config, f"{size.name} at {length} tokens")
    float8_products(config)
