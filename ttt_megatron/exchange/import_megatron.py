"""Megatron-LM's GPT models: which are imported, and as what.

Exactly, as models without post norms: RMSNorm, SwiGLU, rotary embedding over whole heads, no
biases. Queries, keys and values are fused as ours are, grouped by key head.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_source import ImportSource, Weights
from ttt_megatron.exchange.megatron_arrays import MegatronArrays, open_megatron
from ttt_megatron.exchange.plain_model import check_shapes, place_plain, plain_shapes

_WHOLE = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.final_layernorm.weight": "final_norm",
    "output_layer.weight": "output",
}
_OF_LAYERS = {
    "input_layernorm.weight": "attention_norm",
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm",
    "self_attention.linear_qkv.weight": "qkv",
    "self_attention.linear_proj.weight": "proj",
    "self_attention.q_layernorm.weight": "q_norm",
    "self_attention.k_layernorm.weight": "k_norm",
    "pre_mlp_layernorm.weight": "mlp_norm",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm",
    "mlp.linear_fc1.weight": "fc1",
    "mlp.linear_fc2.weight": "fc2",
}
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("position_embedding_type", ("rope",), "ours are rotary"),
    ("rotary_percent", (1, 1.0), "ours rotate whole heads"),
    ("use_rope_scaling", (False, None), "ours do not scale the rotary frequencies"),
    ("rotary_seq_len_interpolation_factor", (None,), "ours do not scale positions"),
    ("normalization", ("RMSNorm",), "ours are RMSNorm"),
    ("apply_layernorm_1p", (False, None), "ours have gains around 1"),
    ("swiglu", (True,), "ours are SwiGLU"),
    ("num_experts", (None, 0), "ours are dense"),
    ("multi_latent_attention", (False, None), "ours have keys and values of their own"),
    ("window_attn_skip_freq", (None,), "our layers are all alike"),
)


def look_at_megatron(path: Path, layout: str | None, heads: int | None) -> ImportSource:
    """An iteration's folder, or a run's (its last), as a source.

    `layout` ("half" or "interleaved") and `heads` are what the user says of heads.

    Raises UserError naming the argument or array that our models cannot represent, or what the
    checkpoint does not say.
    """
    arrays = open_megatron(path)
    _refuse(arrays)
    parts = {name: _parts(name, shape) for name, shape in arrays.shapes.items()}
    parts = {name: of for name, of in parts.items() if not name.endswith("_extra_state")}
    found = {
        part: shape[1:] if _is_stacked(name) else shape
        for name, shape in arrays.shapes.items()
        for part in parts.get(name, ())
    }
    shapes = _settle(arrays, found, heads)
    model = ModelConfig(**{key.removeprefix("model."): value for key, value in shapes.items()})
    expected = plain_shapes(model, fused=True)
    check_shapes(
        arrays.path,
        {_label(part): shape for part, shape in found.items()},
        {_label(part): shape for part, shape in expected.items()},
    )
    halves = _rope_layout(arrays, layout) == "half"

    def read_and_place(name: str, weights: Weights, into: ModelConfig) -> None:
        values = arrays.read(name)
        for part, value in zip(
            parts[name], values if _is_stacked(name) else values.unsqueeze(0), strict=True
        ):
            place_plain(part, value, weights, into, halves=halves)

    return ImportSource(
        path=arrays.path,
        kind="Megatron GPT model",
        shapes=shapes,
        stated={"model.num_suffix_layers": 0} | _stated(arrays.arguments),
        required=("model.window_size", "model.rope_theta", "model.norm_eps"),
        step=arrays.iteration,
        arrays=list(parts),
        place=read_and_place,
        notes=()
        if arrays.arguments
        else ("warning: it does not hold its run's arguments; it is taken for a SwiGLU model",),
    )


def _is_stacked(name: str) -> bool:
    """Whether an array is one of all layers, along its first axis."""
    match = _LAYER.fullmatch(name)
    return match is not None and match[1] is None


def _parts(name: str, shape: tuple[int, ...]) -> list[str]:
    """The parts of the model that an array holds; its own name if it is unknown."""
    if name in _WHOLE:
        return [_WHOLE[name]]
    match = _LAYER.fullmatch(name)
    kind = _OF_LAYERS.get(match[2]) if match else None
    if match is None or kind is None:
        return [name]
    layers = range(shape[0]) if match[1] is None else [int(match[1])]
    return [f"{layer}.{kind}" for layer in layers]


def _label(part: str) -> str:
    """The name that GPTModel has for a part; an unknown array's own."""
    whole = {ours: theirs for theirs, ours in _WHOLE.items()}
    of_layers = {ours: theirs for theirs, ours in reversed(_OF_LAYERS.items())}
    layer, _, kind = part.partition(".")
    if layer.isdigit() and kind in of_layers:
        return f"decoder.layers.{layer}.{of_layers[kind]}"
    return whole.get(part, part)


def _refuse(arrays: MegatronArrays) -> None:
    """Raises UserError at the first argument of the run that ours cannot have."""
    for name, fine, why in _REFUSED:
        value = arrays.arguments.get(name, fine[0])
        if value not in fine:
            raise UserError(
                f"{arrays.path}: its run had {name} = {value}, and {why}: it cannot be imported"
            )


def _settle(
    arrays: MegatronArrays, found: dict[str, tuple[int, ...]], heads: int | None
) -> dict[str, Any]:
    """Our settings of the model's shape; UserError if the arrays do not settle them."""
    for part in ("embedding", "0.qkv", "0.fc2"):
        if len(found.get(part, ())) != 2:
            raise UserError(f"{arrays.path} has no array {_label(part)}: it holds no GPT model")
    rows, width = found["embedding"]
    norm = found.get("0.q_norm")
    heads = arrays.arguments.get("num_attention_heads", heads)
    if heads is None and norm is not None:
        heads = width // norm[0]
    if not heads:
        raise UserError(
            f"{arrays.path} does not say how many heads it has: give model.num_heads=NUMBER"
        )
    channels = arrays.arguments.get("kv_channels") or (norm[0] if norm else width // heads)
    columns = found["0.qkv"][0]
    groups = (columns // channels - heads) // 2
    if channels * heads != width or groups < 1 or (heads + 2 * groups) * channels != columns:
        raise UserError(
            f"{arrays.path}: array {_label('0.qkv')} of {columns} rows is not of {heads} heads "
            f"that share out a width of {width}, as ours do; set model.num_heads if that is wrong, "
            f"otherwise it cannot be imported"
        )
    return {
        "model.vocab_size": rows,
        "model.num_layers": sum(part.endswith(".qkv") for part in found),
        "model.hidden_size": width,
        "model.num_heads": heads,
        "model.num_kv_heads": groups,
        "model.ffn_hidden_size": found["0.fc2"][1],
        "model.tie_embeddings": "output" not in found,
        "model.post_norm": False,
        "model.qk_norm": norm is not None,
    }


def _rope_layout(arrays: MegatronArrays, layout: str | None) -> str:
    """How heads are rotated: "half" or "interleaved"."""
    own = arrays.arguments.get("rotary_interleaved")
    said = None if own is None else ("interleaved" if own else "half")
    if said is None and layout is None:
        raise UserError(
            f"{arrays.path} does not say how heads are rotated: give --rope-layout half "
            f"(Megatron's default) or interleaved (--rotary-interleaved)"
        )
    if said is not None and layout not in (None, said):
        raise UserError(
            f"{arrays.path} says that heads are rotated {said}, and --rope-layout {layout} is "
            f"given; leave it out"
        )
    return said or layout or "half"


def _stated(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the run's arguments say."""
    stated: dict[str, Any] = {}
    if "rotary_base" in arguments:
        stated["model.rope_theta"] = float(arguments["rotary_base"])
    if "norm_epsilon" in arguments:
        stated["model.norm_eps"] = float(arguments["norm_epsilon"])
    if arguments:
        # Megatron counts the keys before a query, and -1 is all of them.
        before = (arguments.get("window_size") or (-1, 0))[0]
        stated["model.window_size"] = None if before < 0 else before + 1
    return stated
