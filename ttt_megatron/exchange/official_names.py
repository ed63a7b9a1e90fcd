"""The official JAX implementation's arrays, and where their values go in our parameters.

Its arrays are stacked over blocks ("blocks.", first block first) or over the prime MLPs
("prime.", whose slot i belongs to block L − S + i), and its matrices are [in, out], used as x @ M.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.model.transformer import LanguageModel

_MODEL = "language_model.model."
_BLOCKS, _PRIME = f"{_MODEL}h.blocks.", f"{_MODEL}h.prime_storage."
_STORED = {
    "wte": f"{_MODEL}wte",
    "ln_f": f"{_MODEL}ln_f",
    **{
        f"blocks.{name}": f"{_BLOCKS}seq_modeling_block.{name}"
        for name in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")
    },
    **{f"blocks.{name}": f"{_BLOCKS}feed_forward.{name}" for name in ("w1", "w2", "w3")},
    **{
        f"blocks.{name}": f"{_BLOCKS}{name}"
        for name in ("seq_norm", "seq_post_norm", "ffn_norm", "ffn_post_norm")
    },
    **{f"prime.{name}": f"{_PRIME}feed_forward_prime.{name}" for name in ("w1", "w2", "w3")},
    "prime.norm": f"{_PRIME}ffn_prime_norm",
    "prime.post_norm": f"{_PRIME}ffn_prime_post_norm",
}
STORED_NAMES = {short: f"{stored}.weight" for short, stored in _STORED.items()}
"""The name of every array in a checkpoint, by its short name."""

_Part = Callable[[Tensor, int], Tensor]
"""From one of our parameters and the head dim to the part of it, [out, in], that an array fills."""


def _all(parameter: Tensor, head_dim: int) -> Tensor:
    return parameter


def _of_heads(index: int) -> _Part:
    """Our qkv rows lie head by head: its query, its key, its value."""
    return lambda parameter, head_dim: parameter.unflatten(0, (-1, 3, head_dim))[:, index]


def _half(index: int) -> _Part:
    return lambda parameter, head_dim: parameter.unflatten(0, (2, -1))[index]


_MLP: dict[str, tuple[str, _Part]] = {
    "w1": ("linear_fc1", _half(0)),
    "w3": ("linear_fc1", _half(1)),
    "w2": ("linear_fc2", _all),
}
_PLACES: dict[str, tuple[str, _Part]] = {
    "blocks.wq": ("self_attention.linear_qkv", _of_heads(0)),
    "blocks.wk": ("self_attention.linear_qkv", _of_heads(1)),
    "blocks.wv": ("self_attention.linear_qkv", _of_heads(2)),
    "blocks.wo": ("self_attention.linear_proj", _all),
    "blocks.q_norm": ("self_attention.q_layernorm", _all),
    "blocks.k_norm": ("self_attention.k_layernorm", _all),
    "blocks.seq_norm": ("attention_norm", _all),
    "blocks.seq_post_norm": ("attention_post_norm", _all),
    "blocks.ffn_norm": ("mlp_norm", _all),
    "blocks.ffn_post_norm": ("mlp_post_norm", _all),
    "prime.norm": ("prime_norm", _all),
    "prime.post_norm": ("prime_post_norm", _all),
    **{f"blocks.{name}": (f"mlp.{layer}", part) for name, (layer, part) in _MLP.items()},
    **{f"prime.{name}": (f"prime_mlp.{layer}", part) for name, (layer, part) in _MLP.items()},
}
_WHOLE = {"wte": "embedding.weight", "ln_f": "final_norm.weight"}


def official_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The arrays, by short name, of the official implementation's model of this configuration.

    Such a model has a tied head, as many key as query heads, and a prime MLP as wide as the
    static one.
    """
    width, ffn, layers = model.hidden_size, model.ffn_hidden_size, model.num_layers
    square, norm, head = (width, width), (width,), (width // model.num_heads,)
    mlp: dict[str, tuple[int, ...]] = {"w1": (width, ffn), "w2": (ffn, width), "w3": (width, ffn)}
    block = mlp | dict.fromkeys(("wq", "wk", "wv", "wo"), square)
    block |= dict.fromkeys(("q_norm", "k_norm"), head)
    block |= dict.fromkeys(("seq_norm", "seq_post_norm", "ffn_norm", "ffn_post_norm"), norm)
    prime = mlp | {"norm": norm, "post_norm": norm} if model.num_suffix_layers else {}
    return {
        "wte": (model.vocab_size or 0, width),
        "ln_f": norm,
        **{f"blocks.{name}": (layers, *shape) for name, shape in block.items()},
        **{f"prime.{name}": (model.num_suffix_layers, *s) for name, s in prime.items()},
    }


def place(name: str, values: Tensor, ours: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Copies an official array, by its short name, into our parameters of a `LanguageModel`."""
    if name in _WHOLE:
        ours[_WHOLE[name]].copy_(values)
        return
    layer, part = _PLACES[name]
    head_dim = model.hidden_size // model.num_heads
    first = model.num_layers - model.num_suffix_layers if name.startswith("prime.") else 0
    for index, value in enumerate(values, start=first):
        target = part(ours[f"layers.{index}.{layer}.weight"], head_dim)
        # Rows of heads lie apart: [in, out] is turned, then cut as the target is.
        target.copy_((value.mT if value.dim() == 2 else value).reshape(target.shape))


def to_ours(arrays: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """All official arrays by our parameters' names, in our layout, in the arrays' dtype.

    Raises ValueError unless the arrays are those of this configuration.
    """
    found = {name: tuple(values.shape) for name, values in arrays.items()}
    if found != official_shapes(model):
        raise ValueError(f"the arrays are not those of {model}: {found}")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LanguageModel(model).named_parameters()}
    dtype = arrays["wte"].dtype
    ours = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    for name, values in arrays.items():
        place(name, values, ours, model)
    return ours
