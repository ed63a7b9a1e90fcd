"""Bytes of one sequence's state, by the shape of the model."""

import math

import torch

from ttt_megatron.hf.configuration_ttt_e2e import TTTE2EConfig

# A cache makes room for so many tokens at first, and doubles from there.
_FIRST_CAPACITY = 64


def fast_weight_count(config: TTTE2EConfig) -> int:
    """Fast weights of one sequence."""
    per_block = 3 * config.hidden_size * config.prime_intermediate_size
    return int(config.inner["num_suffix_layers"]) * per_block


def row_bytes(
    config: TTTE2EConfig, dtype: torch.dtype, tokens: float = math.inf, *, learns: bool = True
) -> int:
    """The most bytes a row that has read `tokens` takes in a cache, in use.

    Fast weights in the dtype they are kept in, and, where that is not `dtype`, once more rounded;
    keys and values of window − 1 + chunk tokens (or those there were) of every layer; the chunk
    that is not full. dtype is that of the model's weights. For a model of full attention, tokens
    must be finite.
    """
    inner, size = config.inner, dtype.itemsize
    assert config.num_key_value_heads is not None
    room = max(_FIRST_CAPACITY, 2 * tokens)
    if inner["window_size"] is not None:
        room = min(room, inner["window_size"] - 1 + inner["chunk_size"])
    slot = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * size
    rings = (int(room) + 1) * slot
    last_hidden = config.hidden_size * size
    if not learns:
        return rings + last_hidden
    kept = torch.promote_types(getattr(torch, inner["state_dtype"]), dtype)
    fast = fast_weight_count(config) * (kept.itemsize + (0 if kept == dtype else size))
    pending = (inner["chunk_size"] + 1) * (8 + config.hidden_size * size)
    return fast + rings + pending + last_hidden
