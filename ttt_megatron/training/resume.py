"""Going on with a run: which settings may have changed since, and which may not."""

from collections.abc import Collection
from pathlib import Path

from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.index import read_index
from ttt_megatron.errors import UserError
from ttt_megatron.training.checkpoint_folder import CheckpointInfo

# Neither the model, nor its data, nor the course of its training depends on these. The data's
# fingerprint is compared apart from its path.
_FREE_SECTIONS = ("faults", "parallel", "tracking")
_FREE_KEYS = frozenset(
    {
        "name",
        "data.path",
        "inner.memory_policy",
        "inner.two_level",
        "inner.segment_chunks",
        "optimizer.engine",
        "optimizer.fused",
        "optimizer.zero_stage",
        "training.micro_batch_size",
        "training.device",
        "training.fused_norm",
        "training.mixer_kernels",
        "training.recompute_prefix",
        "training.init_from",
        "training.output",
        "training.save_interval",
        "training.keep_last",
        "training.milestone_interval",
        "training.async_save",
        "training.log_interval",
        "training.eval_interval",
        "training.cuda_graphs",
        "training.trace",
        "training.eval_sequences",
    }
)


def refuse_changes(
    saved: RunConfig, config: RunConfig, checkpoint: str, *, fixed: Collection[str] = ()
) -> None:
    """Raises UserError naming every key that differs from the checkpoint's run and must not.

    `fixed` are keys that must not either, though training does not depend on them.
    """
    before, now = to_flat(saved), to_flat(config)
    changed = [
        f"{key} is {now[key]} and was {before[key]}"
        for key in now
        if now[key] != before[key] and (key in fixed or not _is_free(key))
    ]
    if changed:
        raise UserError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(changed)}. Set them "
            f"back to go on with it, or start anew with another training.output or with --fresh"
        )


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or key.split(".")[0] in _FREE_SECTIONS


def refuse_other_data(checkpoint: CheckpointInfo, folder: str) -> None:
    """Raises UserError if prepared data is not what a checkpoint was trained on, or is damaged."""
    fingerprint = read_index(Path(folder)).fingerprint
    if fingerprint != checkpoint.data_fingerprint:
        raise UserError(
            f"{checkpoint.path} was trained on other data than {folder} holds (fingerprint "
            f"{fingerprint[:12]}, the checkpoint's {checkpoint.data_fingerprint[:12]}): restore "
            "the data, or start anew in another folder"
        )
