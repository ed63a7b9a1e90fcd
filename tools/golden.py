"""Reads golden files and carries their weights into a model, and a model's gradients back."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner

BLOCK_NORMS = {
    "seq_norm": "attention_norm",
    "seq_post_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_post_norm": "mlp_post_norm",
}


@dataclass
class Golden:
    """One golden file: its configuration and its arrays."""

    name: str
    config: dict
    arrays: dict[str, np.ndarray]

    @property
    def is_meta(self) -> bool:
        """Whether inner steps were taken."""
        return bool(self.config["mode"] == "meta")

    @property
    def inner_lr(self) -> float:
        """The inner learning rate in force, its warm-up applied."""
        return float(self.config["inner_lr"] * self.arrays.get("ilr_multiplier", 1.0))

    def tensor(self, name: str) -> Tensor:
        """An array as a float64 tensor."""
        return torch.from_numpy(np.asarray(self.arrays[name], dtype=np.float64))

    def batch(self, suffix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """tokens, targets [b, T] int64 and mask [b, T] bool."""
        names = (f"{part}{suffix}" for part in ("input_ids", "target_tokens", "loss_masks"))
        prefix = "outer/" if suffix else ""
        tokens, targets, mask = (torch.from_numpy(self.arrays[prefix + name]) for name in names)
        return tokens.long(), targets.long(), mask.bool()


def read_golden(path: Path) -> Golden:
    """Read a golden file; raises UserError if it is not one."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        config = json.loads(str(arrays.pop("config")))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a golden file ({error}); give .npz files") from error
    return Golden(path.stem, config, arrays)


def build_learner(golden: Golden, dtype: torch.dtype, **inner: object) -> Learner:
    """A learner of the file's shape that holds its weights."""
    config = golden.config
    model_config = ModelConfig(
        vocab_size=config["vocab"],
        num_layers=config["layers"],
        num_suffix_layers=config["suffix_len"] if config["prime"] else 0,
        hidden_size=config["hidden"],
        num_heads=config["heads"],
        ffn_hidden_size=config["intermediate"],
        window_size=None if config["block"] == "self_attention" else config["window"],
        rope_theta=config["rope_theta"],
    )
    settings = {
        "mode": "meta" if golden.is_meta else "off",
        "chunk_size": config["chunk"],
        "lr": config["inner_lr"],
        "clip": config["inner_clip"],
        **inner,
    }
    learner = Learner(model_config, InnerConfig(**settings), dtype=dtype)
    load_weights(learner, {k[2:]: golden.tensor(k) for k in golden.arrays if k.startswith("w/")})
    return learner


def load_weights(learner: Learner, weights: dict[str, Tensor]) -> None:
    """Copy golden weights, by their golden names, into the learner."""
    state = learner.model.state_dict()
    for name, value in to_ours(weights, learner).items():
        state[name].copy_(value)


def to_ours(golden: dict[str, Tensor], learner: Learner) -> dict[str, Tensor]:
    """Golden arrays by our parameters' names, in our layout ([out, in], fused qkv and fc1)."""
    model = learner.model
    ours = {"embedding.weight": golden["wte"], "final_norm.weight": golden["ln_f"]}
    head_dim = model.head_dim
    for layer in range(len(model.layers)):
        block = {k.split(".")[1]: v[layer] for k, v in golden.items() if k.startswith("blocks.")}
        top = f"layers.{layer}."
        heads = [block[f"w{part}"].mT.unflatten(0, (-1, head_dim)) for part in "qkv"]
        ours[f"{top}self_attention.linear_qkv.weight"] = torch.stack(heads, 1).flatten(0, 2)
        ours[f"{top}self_attention.linear_proj.weight"] = block["wo"].mT
        ours[f"{top}self_attention.q_layernorm.weight"] = block["q_norm"]
        ours[f"{top}self_attention.k_layernorm.weight"] = block["k_norm"]
        ours |= _mlp(f"{top}mlp", block)
        ours |= {f"{top}{our}.weight": block[theirs] for theirs, our in BLOCK_NORMS.items()}
        slot = layer - model.num_prefix_layers
        if slot >= 0:
            prime = {k.split(".")[1]: v[slot] for k, v in golden.items() if k.startswith("prime.")}
            ours |= _mlp(f"{top}prime_mlp", prime)
            ours[f"{top}prime_norm.weight"] = prime["norm"]
            ours[f"{top}prime_post_norm.weight"] = prime["post_norm"]
    return ours


def _mlp(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{name}.linear_fc1.weight": torch.cat((weights["w1"].mT, weights["w3"].mT)),
        f"{name}.linear_fc2.weight": weights["w2"].mT,
    }


def fast_to_golden(fast: list[Tensor]) -> dict[str, Tensor]:
    """Flat fast weights [b, out, in] as the golden `fast/w1`, `w2`, `w3` [b, S, in, out]."""
    gate, up = zip(*(fc1.chunk(2, dim=1) for fc1 in fast[::2]), strict=True)
    parts = {"w1": gate, "w3": up, "w2": tuple(fast[1::2])}
    return {name: torch.stack([w.mT for w in part], dim=1) for name, part in parts.items()}
