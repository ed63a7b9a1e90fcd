"""What a stage needs to be there, or on its way, when it is submitted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ttt_megatron.cluster.records import JobRecord, read_records
from ttt_megatron.cluster.slurm import QueuedJob, squeue
from ttt_megatron.cluster.submission import Stage
from ttt_megatron.errors import UserError
from ttt_megatron.training.checkpoint_folder import (
    CHECKPOINTS,
    newest_complete,
    read_config,
    resolve_checkpoint,
)
from ttt_megatron.training.resume import refuse_changes


def jobs_to_wait_for(stages: Sequence[Stage], after: Sequence[str]) -> list[str]:
    """`after`, and the jobs that still train what the first stage starts from.

    Raises UserError if a stage's folder holds a run that it cannot go on with, or is trained in by
    a job that has not ended; and if training.init_from names neither a finished run nor one that a
    job trains.
    """
    known = [record for stage in stages for record in read_records(stage.output.parent)]
    first = stages[0]
    start = first.config.training.init_from
    if start is not None:
        known += read_records(Path(start).absolute().parent)
    known = list({record.job_id: record for record in known}.values())
    queue = squeue(record.user for record in known) if known else {}
    active = [record for record in known if _is_active(record, queue)]
    for stage in stages:
        _refuse_other_job(stage, active)
        _refuse_other_run(stage)
    wanted = list(after)
    if start is not None and not after:
        trainers = [r for r in active if r.output == str(Path(start).absolute())]
        wanted += [record.job_id for record in trainers]
        if not trainers and not _has_checkpoint(first):
            resolve_checkpoint(Path(start))
    return wanted


def _is_active(record: JobRecord, queue: Mapping[str, QueuedJob]) -> bool:
    tasks = [f"{record.job_id}_{index}" for index in record.tasks] or [record.job_id]
    return any(task in queue and queue[task].active for task in tasks)


def _has_checkpoint(stage: Stage) -> bool:
    folder = stage.output / CHECKPOINTS
    return folder.is_dir() and newest_complete(folder, quick=True) is not None


def _refuse_other_job(stage: Stage, active: Sequence[JobRecord]) -> None:
    for record in active:
        if record.output == str(stage.output):
            raise UserError(
                f"job {record.job_id} trains in {stage.config.training.output} already: wait for "
                f"it, cancel it (`ttt-megatron cancel {record.job_id}`), or choose another "
                "training.output"
            )


def _refuse_other_run(stage: Stage) -> None:
    folder = stage.output / CHECKPOINTS
    checkpoint = newest_complete(folder, quick=True) if folder.is_dir() else None
    if checkpoint is None:
        return
    saved, config = read_config(checkpoint), stage.config
    if config.model.vocab_size is None:  # as the data has it
        model = replace(config.model, vocab_size=saved.model.vocab_size)
        config = replace(config, model=model)
    refuse_changes(saved, config, str(checkpoint))
