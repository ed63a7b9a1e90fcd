"""What systems take in memory: weights, sessions, and a training step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ttt_megatron.baselines.counts import count_with_mixers
from ttt_megatron.bench import models
from ttt_megatron.bench.memory import peak_bytes
from ttt_megatron.bench.planned import no_less
from ttt_megatron.config.schema import RunConfig

# Chunks of the two short sequences that what the planner does not know is tried on.
_SHORT, _LONGER = 1, 2


def weight_bytes(config: RunConfig) -> float:
    """Of the parameters, of any mixers."""
    return float(count_with_mixers(config.model).total * _element(config))


def session_bytes(config: RunConfig) -> float:
    """Weights, and keys and values: of all tokens under full attention, twice while they grow.

    States of other mixers are left out: they do not grow.
    """
    model, length = config.model, config.data.sequence_length
    windows = {"full": length, "swa_ttt_kvb": model.window_size, "attention": model.window_size}
    kept = sum(
        min(windows[kind] or length, length) for kind in model.mixer_kinds if kind in windows
    )
    width = (model.num_kv_heads or model.num_heads) * (model.hidden_size // model.num_heads)
    return weight_bytes(config) + 2 * 2 * kept * width * _element(config)


def step_bytes(config: RunConfig, device: torch.device) -> float | None:
    """What a training step holds besides weights; None for mixers that the planner does not know.

    Of full attention in some blocks it is that of full attention in all.
    """
    if no_less(config) is None:
        return None
    return models.step_bytes(config, device) - models.weight_bytes(config, device)


def tried_step_bytes(
    step: Callable[[int], Any], config: RunConfig, device: torch.device
) -> float | None:
    """The same from two short sequences, as it grows evenly with length where mixers are linear.

    step: runs a training step over so many tokens; None if the sequence is hardly longer itself.
    """
    chunk, length = config.inner.chunk_size, config.data.sequence_length
    if length <= 2 * _LONGER * chunk:
        return None
    least, more = (peak_bytes(partial(step, n * chunk), device) for n in (_SHORT, _LONGER))
    return least + (more - least) * (length / chunk - _SHORT) / (_LONGER - _SHORT)


def _element(config: RunConfig) -> int:
    return 8 if config.training.precision == "fp64" else 4
