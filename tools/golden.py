"""Reads golden files and carries their weights into a model, and a model's gradients back."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ttt_megatron.config.schema import InnerConfig, ModelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange import official_names
from ttt_megatron.meta.learner import Learner


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
    return official_names.to_ours(golden, learner.model.config)


def fast_to_golden(fast: list[Tensor]) -> dict[str, Tensor]:
    """Flat fast weights [b, out, in] as the golden `fast/w1`, `w2`, `w3` [b, S, in, out]."""
    gate, up = zip(*(fc1.chunk(2, dim=1) for fc1 in fast[::2]), strict=True)
    parts = {"w1": gate, "w3": up, "w2": tuple(fast[1::2])}
    return {name: torch.stack([w.mT for w in part], dim=1) for name, part in parts.items()}
