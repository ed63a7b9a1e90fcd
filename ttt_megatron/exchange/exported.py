"""Reading an exported folder back: the same weights and settings, in a learner."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.exchange.hf_config import our_parameter_name, with_exported
from ttt_megatron.hf.configuration_ttt_e2e import TTTE2EConfig
from ttt_megatron.meta.learner import Learner
from ttt_megatron.training.checkpoint_folder import CheckpointInfo, read_config, read_info
from ttt_megatron.training.manifest import find_damage

CONFIG = "config.json"


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported model, by its config.json."""
    try:
        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_type"]
        return bool(model_type == TTTE2EConfig.model_type)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_exported(folder: Path) -> None:
    """Raises UserError unless every file of an exported folder is as it was written."""
    damage = find_damage(folder)
    if damage is not None:
        raise UserError(f"exported model {folder} is damaged: {damage}. Export it again")


def load_exported(folder: Path) -> tuple[Learner, RunConfig, CheckpointInfo]:
    """The model of an exported folder, its run's configuration, and of which checkpoint it is.

    On the CPU; parameters are float32, activations in the dtype of the stored weights. Raises
    UserError if a file is missing or damaged, or the weights are not those of the configuration.
    """
    check_exported(folder)
    exported = TTTE2EConfig.from_pretrained(folder, local_files_only=True)
    config = with_exported(read_config(folder), exported)
    stored = exported.dtype if isinstance(exported.dtype, torch.dtype) else torch.float32
    learner = Learner(config.model, config.inner, compute_dtype=stored)
    weights = {our_parameter_name(name): x for name, x in _read_weights(folder).items()}
    shapes = {name: x.shape for name, x in weights.items()}
    if shapes != {name: p.shape for name, p in learner.model.named_parameters()}:
        raise UserError(
            f"{folder}: its weights are not those that {CONFIG} describes: export the model again"
        )
    learner.model.load_state_dict(weights)
    return learner, config, read_info(folder)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights
