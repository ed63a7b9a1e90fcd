"""Llama-like models that Hugging Face transformers saved: which are imported, and as what.

Exactly, as models without post norms (and without norms of queries and keys, but Qwen3's): heads
are put from halves into the interleaved order, and nothing else is changed.
"""

from pathlib import Path
from typing import Any

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_source import ImportSource, Weights
from ttt_megatron.exchange.plain_model import check_shapes, place_plain, plain_shapes
from ttt_megatron.exchange.safetensors_folder import SafetensorsFolder

_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_OF_LAYERS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}
_TABLE = ".rotary_emb.inv_freq"


def look_at_hugging_face(folder: Path) -> ImportSource:
    """A local model folder as a source.

    Raises UserError naming the setting, file or array that our models cannot represent.
    """
    config = _read_config(folder)
    where = str(folder / _CONFIG)
    shapes = _shapes(config, where)
    stated = {
        "model.num_suffix_layers": 0,
        "model.window_size": _window(config, where),
        "model.rope_theta": _theta(config, where),
        "model.norm_eps": float(config.rms_norm_eps),
    }
    model = ModelConfig(**{key.removeprefix("model."): value for key, value in shapes.items()})
    arrays = SafetensorsFolder(folder)
    found = {n: s for n, s in arrays.shapes().items() if not n.endswith(_TABLE)}
    if model.tie_embeddings:
        # Written by some although the model never reads it.
        found.pop(_NAMES["output"], None)
    expected = {_name(part): (part, shape) for part, shape in plain_shapes(model).items()}
    check_shapes(folder, found, {name: shape for name, (_, shape) in expected.items()})

    def read_and_place(name: str, weights: Weights, into: ModelConfig) -> None:
        place_plain(expected[name][0], arrays.read(name), weights, into, halves=True)

    return ImportSource(
        path=folder,
        kind=f"{config.model_type} model of transformers",
        shapes=shapes,
        stated=stated,
        arrays=list(expected),
        place=read_and_place,
        tokenizer=folder if (folder / _TOKENIZER).is_file() else None,
    )


def _name(part: str) -> str:
    if part in _NAMES:
        return _NAMES[part]
    layer, _, kind = part.partition(".")
    return f"model.layers.{layer}.{_OF_LAYERS[kind]}.weight"


def _read_config(folder: Path) -> Any:
    """The configuration as transformers reads it, its own defaults filled in."""
    from transformers import AutoConfig, PretrainedConfig

    path = folder / _CONFIG
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder that transformers' save_pretrained left")
    try:
        raw, _ = PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
        kind = raw.get("model_type")
        known = kind in _TYPES
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True) if known else None
    except Exception as error:  # whatever the library's checks raise
        raise UserError(
            f"{path} cannot be read by transformers ({str(error).splitlines()[0]}): save the "
            f"model again"
        ) from None
    if config is None:
        raise UserError(
            f"{path}: model_type = {kind} is not imported: only {', '.join(_TYPES)} are"
        )
    return config


def _shapes(config: Any, where: str) -> dict[str, Any]:
    """Our settings of the model's shape; UserError for what our blocks cannot compute."""
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    if head_dim * heads != width:
        raise UserError(
            f"{where}: head_dim = {head_dim} times num_attention_heads = {heads} is not "
            f"hidden_size = {width}, and our heads share out the width: it cannot be imported"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act = {config.hidden_act} is not silu, which ours is")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise UserError(f"{where}: {key} = true, and our linear maps have no biases")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{where}: quantization_config is set: save the model in float first")
    return {
        "model.vocab_size": config.vocab_size,
        "model.num_layers": config.num_hidden_layers,
        "model.hidden_size": width,
        "model.num_heads": heads,
        "model.num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "model.ffn_hidden_size": config.intermediate_size,
        "model.tie_embeddings": bool(config.tie_word_embeddings),
        "model.post_norm": False,
        "model.qk_norm": config.model_type == "qwen3",
    }


def _theta(config: Any, where: str) -> float:
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UserError(
            f"{where}: rope_type = {kind} scales the rotary frequencies, and ours are plain: it "
            f"cannot be imported"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor = {rope['partial_rotary_factor']} rotates a part of "
            f"every head, and ours are rotated whole: it cannot be imported"
        )
    return float(rope["rope_theta"])


def _window(config: Any, where: str) -> int | None:
    """Keys a query sees in every layer; None is all of them."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        raise UserError(
            f"{where}: layer_types has {', '.join(sorted(kinds))}, and our layers are all alike: "
            f"it cannot be imported"
        )
    return None if kinds == {"full_attention"} else window
