"""Going on with a run: which settings may have changed since, and which may not."""

from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError

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


def refuse_changes(saved: RunConfig, config: RunConfig, checkpoint: str) -> None:
    """Raises UserError naming every key that differs from the checkpoint's run and must not."""
    before, now = to_flat(saved), to_flat(config)
    changed = [
        f"{key} is {now[key]} and was {before[key]}"
        for key in now
        if now[key] != before[key]
        and key not in _FREE_KEYS
        and key.split(".")[0] not in _FREE_SECTIONS
    ]
    if changed:
        raise UserError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(changed)}. Set them "
            f"back to go on with it, or start anew with another training.output or with --fresh"
        )
