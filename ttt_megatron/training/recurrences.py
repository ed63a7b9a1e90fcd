"""Whose kernels run the recurrences of a model's mixers; models without such mixers need none."""

from collections.abc import Sequence

import torch

from ttt_megatron.config.schema import MixerKernels
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups

_WITH_RECURRENCES = {"mamba2", "gated_delta"}


def use_recurrences(
    wanted: MixerKernels, learners: Sequence[Learner], groups: Groups, dtype: torch.dtype
) -> dict[str, str]:
    """Have the learners' mixers use what is wanted: which has which, and why. Collective.

    Raises UserError if flash-linear-attention is asked for by name and not to be had, or if ranks
    would run different ones.
    """
    kinds = {kind for learner in learners for kind in learner.model.config.mixer_kinds}
    if not kinds & _WITH_RECURRENCES:
        return {}
    if wanted == "plain":
        return {"recurrences": "plain PyTorch (training.mixer_kernels = plain)"}
    from ttt_megatron.baselines.fla_kernels import use_fla_kernels

    chosen: dict[str, str] = {}
    for learner in learners:
        chosen |= use_fla_kernels(learner.model.modules(), groups.device, dtype)
    # Ranks of a pipeline may hold mixers of different kinds.
    known: dict[str, tuple[int, str]] = {}
    for rank, theirs in enumerate(groups.gather_objects(chosen)):
        for kind, kernel in theirs.items():
            if wanted == "flash-linear-attention" and kernel != wanted:
                raise UserError(
                    f"training.mixer_kernels = {wanted}, and {kind} has {kernel} on rank {rank}; "
                    "set training.mixer_kernels=plain, or auto for what there is"
                )
            first, other = known.setdefault(kind, (rank, kernel))
            if kernel != other:
                raise UserError(
                    f"{kind} has {kernel} on rank {rank} and {other} on rank {first}; install the "
                    "same packages everywhere, or set training.mixer_kernels=plain"
                )
    return {f"{kind}'s recurrence": kernel for kind, (_, kernel) in known.items()}
