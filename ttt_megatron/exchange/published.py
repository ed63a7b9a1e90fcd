"""The published models, by the shapes of their weights, and the settings those do not show."""

from typing import Any

_VOCABULARY = 128_256
_SHAPES = (
    # layers, suffix, width, heads, MLP width
    (12, 3, 768, 12, 1664),
    (24, 6, 1024, 16, 2304),
    (24, 6, 1536, 16, 3328),
    (24, 6, 2048, 32, 4352),
    (32, 8, 2560, 32, 5632),
)
_KEYS = ("num_layers", "num_suffix_layers", "hidden_size", "num_heads", "ffn_hidden_size")
_SETTINGS = {
    "model.window_size": 8192,
    "model.rope_theta": 500_000.0,
    "model.norm_eps": 1e-6,
    "inner.chunk_size": 1024,
    "inner.lr": 1.0,
    "inner.clip": 1.0,
}


def published_settings(shapes: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted key of the published model of these shapes; empty if it is none of them.

    They are the same at every length that the models were trained at.
    """
    found = tuple(shapes[f"model.{key}"] for key in _KEYS)
    known = found in _SHAPES and shapes["model.vocab_size"] == _VOCABULARY
    return dict(_SETTINGS) if known else {}
