"""Starting from another run's weights: a later stage, or a plain model extended into a TTT model.

A plain model has no prime MLPs. The extended model gets them as initialised, and the gain of the
norm behind each starts at 0 instead of 1: the prime branch then adds exactly nothing, so the
extended model starts as the plain model's function. Training reaches it all the same: the gain's
own gradient does not vanish, and once the gain has moved, everything before it learns, inner
steps included.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.training.checkpoint_folder import resolve_checkpoint
from ttt_megatron.training.weights import read_weights, stored_shapes

logger = logging.getLogger(__name__)

_PRIME = ".prime_"
_PRIME_POST_NORM = ".prime_post_norm."


@torch.no_grad()
def start_from(
    learners: Sequence[Learner], source: Path | str, groups: Groups | None = None
) -> Path:
    """Copies the weights of a run or checkpoint into a fresh learner; returns the checkpoint.

    A rank that holds parts of the model, as several learners may be, takes its parts; the
    `groups` put the whole together, and the call is collective.

    Raises UserError naming the parameter that differs in shape, or that only one side has. Prime
    MLPs that the source lacks altogether are added as the module's docstring says.
    """
    checkpoint = resolve_checkpoint(Path(source))
    weights = read_weights(checkpoint)
    extends = _extends(weights)
    slots = learners[0].model.slots
    parameters = {name: p for learner in learners for name, p in learner.named_parameters()}
    names = set(parameters) if groups is None else groups.union(set(parameters))
    _check_names(names, set(weights), checkpoint, extends)
    for name, parameter in parameters.items():
        if name not in weights:
            if _PRIME_POST_NORM in name:
                parameter.zero_()
            continue
        whole = slots.whole_shape(name, parameter.shape)
        _check_shape(name, whole, weights[name].shape, checkpoint)
        parameter.copy_(slots.take_part(name, weights[name]))
    added = len(names - weights.keys())
    logger.info(
        "weights from %s%s",
        checkpoint,
        f"; prime MLPs ({added} matrices and gains) added, starting as the plain model"
        if added
        else "",
    )
    return checkpoint


def refuse_other_weights(shapes: Mapping[str, torch.Size], source: Path | str) -> None:
    """Raises UserError, as `start_from` does, if a model of whole parameters of these shapes cannot
    start from a run or checkpoint; reads no values."""
    checkpoint = resolve_checkpoint(Path(source))
    stored = stored_shapes(checkpoint)
    _check_names(set(shapes), set(stored), checkpoint, _extends(stored))
    for name, shape in shapes.items():
        if name in stored:
            _check_shape(name, shape, stored[name], checkpoint)


def _extends(weights: Iterable[str]) -> bool:
    """Whether a source is a plain model."""
    return not any(_PRIME in name for name in weights)


def _check_shape(name: str, ours: torch.Size, theirs: torch.Size, checkpoint: Path) -> None:
    if theirs != ours:
        raise UserError(
            f"training.init_from={checkpoint}: parameter {name} has the shape {tuple(theirs)} "
            f"there and {tuple(ours)} in this model; make the model sections equal"
        )


def _check_names(ours: set[str], theirs: set[str], checkpoint: Path, extends: bool) -> None:
    """Refuses a source whose parameters are not this model's."""
    missing = sorted(name for name in ours - theirs if not (extends and _PRIME in name))
    if missing:
        raise UserError(
            f"training.init_from={checkpoint} has no parameter {missing[0]} ({len(missing)} are "
            f"missing); make the model sections equal, or start from a plain model"
        )
    surplus = sorted(theirs - ours)
    if surplus:
        raise UserError(
            f"training.init_from={checkpoint} has a parameter {surplus[0]} that this model lacks "
            f"({len(surplus)} are too many); make the model sections equal"
        )
