"""The parts of a plain model without post norms, by names of our own, and where they go.

"embedding", "final_norm", "output" (untied), and by layer "3.q", "3.k", "3.v" or all in one
"3.qkv", "3.proj", "3.gate" and "3.up" or both in one "3.fc1", "3.fc2", "3.attention_norm",
"3.mlp_norm", "3.q_norm", "3.k_norm".
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ttt_megatron.config.schema import ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.import_source import Weights
from ttt_megatron.exchange.rope_layout import interleaved

_LAYERS = {
    "q": "self_attention.linear_qkv",
    "k": "self_attention.linear_qkv",
    "v": "self_attention.linear_qkv",
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "q_norm": "self_attention.q_layernorm",
    "k_norm": "self_attention.k_layernorm",
    "gate": "mlp.linear_fc1",
    "up": "mlp.linear_fc1",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
    "attention_norm": "attention_norm",
    "mlp_norm": "mlp_norm",
}
_ROTATED = ("q", "k", "q_norm", "k_norm")


def plain_shapes(model: ModelConfig, *, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every part, matrices [out, in]; `fused` with qkv and fc1 in one."""
    width, ffn, heads = model.hidden_size, model.ffn_hidden_size, model.num_heads
    rows, head_dim = model.vocab_size or 0, width // heads
    keys = (model.num_kv_heads or heads) * head_dim
    layer: dict[str, tuple[int, ...]] = {"attention_norm": (width,), "mlp_norm": (width,)}
    if fused:
        layer |= {"qkv": (width + 2 * keys, width), "fc1": (2 * ffn, width)}
    else:
        layer |= {"q": (width, width), "k": (keys, width), "v": (keys, width)}
        layer |= {"gate": (ffn, width), "up": (ffn, width)}
    layer |= {"proj": (width, width), "fc2": (width, ffn)}
    if model.qk_norm:
        layer |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
    return {
        "embedding": (rows, width),
        "final_norm": (width,),
        **({} if model.tie_embeddings else {"output": (rows, width)}),
        **{
            f"{index}.{part}": shape
            for index in range(model.num_layers)
            for part, shape in layer.items()
        },
    }


def check_shapes(
    where: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError naming the first array that is missing, unknown or of another shape."""
    for name in sorted(found.keys() - expected.keys()):
        what = "a bias" if name.endswith("bias") else "an array"
        raise UserError(f"{where} has {what} {name} that our models lack: it cannot be imported")
    for name in sorted(expected.keys() - found.keys()):
        raise UserError(f"{where} has no array {name}: copy or save the model again, whole")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{where}: array {name} has the shape {list(found[name])}, and the model's "
                f"settings make it {list(shape)}; it belongs to another model"
            )


def place_plain(
    part: str, values: Tensor, ours: Weights, model: ModelConfig, *, halves: bool
) -> None:
    """Copies a part into our parameters; `halves` if heads are rotated by halves."""
    if part in ("embedding", "final_norm", "output"):
        ours[f"{part}.weight"].copy_(values)
        return
    layer, _, kind = part.partition(".")
    target = ours[f"layers.{layer}.{_LAYERS[kind]}.weight"]
    head_dim = model.hidden_size // model.num_heads
    if halves and kind in _ROTATED:
        values = interleaved(values, head_dim)
    if kind in ("q", "k", "v", "qkv"):
        # Grouped by key head: its query heads, its key, its value.
        groups = target.unflatten(0, (model.num_kv_heads or model.num_heads, -1, head_dim))
        if kind == "qkv":
            groups.copy_(values.view(groups.shape))
            if halves:
                turned = groups[:, :-1]
                turned.copy_(interleaved(turned.flatten(0, 2), head_dim).view(turned.shape))
            return
        target = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}[kind]
        values = values.reshape(target.shape)
    elif kind in ("gate", "up"):
        target = target.unflatten(0, (2, -1))[("gate", "up").index(kind)]
    target.copy_(values)
