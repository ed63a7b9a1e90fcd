"""What a run's state is, and loading it with mcore's dist_checkpointing (torch_dist format)."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, check_is_distributed_checkpoint
from torch import nn

from ttt_megatron.errors import UserError
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import is_second_copy
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.training.checkpoint_folder import MODEL_KEY, STATE
from ttt_megatron.training.engine import Engine
from ttt_megatron.training.sharding import joined, sharded
from ttt_megatron.training.weights import refuse_other_parameters


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a checkpoint holds tensors of."""

    engine: Engine
    groups: Groups

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters, of all its pipeline stages."""
        return {
            name: parameter
            for learner in self.engine.learners
            for name, parameter in learner.named_parameters()
        }


def _model_state(parts: RunParts) -> dict[str, list[ShardedTensor]]:
    """This rank's part of every parameter; the data × context copies of it are the same."""
    groups = parts.groups
    return {
        name: sharded(
            f"{MODEL_KEY}.{name}",
            name,
            parameter,
            groups,
            groups.copy_rank + is_second_copy(parameter) * groups.world_size,
        )
        for name, parameter in parts.named_parameters().items()
    }


def _random_state() -> dict[str, Any]:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def state_to_save(parts: RunParts, trainer_state: dict[str, Any]) -> dict[str, Any]:
    """All that a checkpoint holds, described for dist_checkpointing.save.

    Collective. Parameters share the model's memory; everything else has memory of its own.
    `trainer_state` is plain values, equal on all ranks.
    """
    groups = parts.groups
    parts.engine.settle()
    return {
        MODEL_KEY: _model_state(parts),
        "optimizer": parts.engine.state_to_save(groups),
        "trainer": trainer_state,
        "random": groups.broadcast_object(_random_state() if groups.is_main else None),
    }


def load_checkpoint(parts: RunParts, checkpoint: Path) -> dict[str, Any]:
    """Restores parameters, optimizer and random state in place; returns the trainer's state.

    Collective; works under any layout, whichever the checkpoint was saved under. Raises UserError
    if the checkpoint's parameters are not this model's, or it has no more than them.
    """
    if not check_is_distributed_checkpoint(str(checkpoint / STATE)):
        raise UserError(
            f"{checkpoint} holds weights alone, as imported ones do: to train on from them, set "
            f"training.init_from={checkpoint} and another training.output"
        )
    parameters = parts.named_parameters()
    refuse_other_parameters(parts.groups.union(set(parameters)), checkpoint)
    wanted = {
        MODEL_KEY: _model_state(parts),
        "optimizer": parts.engine.state_to_load(parts.groups),
    }
    with megatron_scope():
        state = dist_checkpointing.load(
            wanted,
            str(checkpoint / STATE),
            # It would demand that every moment be read whole on some rank, and ranks read theirs.
            validate_access_integrity=False,
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(joined(name, state[MODEL_KEY][name]))
    parts.engine.load_state_dict(state["optimizer"])
    _set_random_state(state["random"])
    trainer_state: dict[str, Any] = state["trainer"]
    return trainer_state
