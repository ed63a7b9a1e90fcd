"""Saving a run's checkpoints, while training waits or while it goes on.

A save has three parts. `start` is collective and copies the state; then every rank writes its
files in a thread; `complete`, collective again, lists them and gives the folder its name. Between
the two, training may go on: what has no final name is no checkpoint.
"""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from ttt_megatron.config import to_yaml
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.tokenizer import META_FILE, TOKENIZER_FILE
from ttt_megatron.errors import PassingError
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.training.background_write import BackgroundWrite, expect_results
from ttt_megatron.training.checkpoint import RunParts, state_to_save
from ttt_megatron.training.checkpoint_folder import (
    CHECKPOINTS,
    RECIPE,
    STATE,
    TOKENIZER,
    CheckpointInfo,
    checkpoint_name,
    commit,
    remove,
    retire,
    unfinished_path,
    write_info,
)
from ttt_megatron.training.manifest import Entries


class SaveError(PassingError):
    """A checkpoint that could not be written; the same on all ranks."""


# More than the plain values that the main rank writes beside the tensors.
_TRIAL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _Save:
    """A save that has been started: its folder until it is complete, and from then on."""

    beside: Path
    final: Path
    info: CheckpointInfo
    request: AsyncRequest
    write: BackgroundWrite


class Saver:
    """Writes a run's checkpoints, one at a time. Every rank has one."""

    def __init__(self, parts: RunParts, config: RunConfig) -> None:
        self._parts = parts
        self._config = config
        self._folder = Path(config.training.output) / CHECKPOINTS
        self._save: _Save | None = None
        self._removal: threading.Thread | None = None

    @property
    def under_way(self) -> bool:
        """Whether a save has been started and not completed: the same on all ranks."""
        return self._save is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._save is not None and not self._save.write.done

    def start(self, info: CheckpointInfo, trainer_state: dict[str, Any]) -> None:
        """Copies the run's state and begins to write it to `output/checkpoints/step-…`.

        Collective; no other save may be under way. `trainer_state` is plain values, equal on all
        ranks.

        Raises SaveError if the folder cannot be made or written to.
        """
        assert self._save is None
        groups = self._parts.groups
        final = self._folder / checkpoint_name(info.step)
        beside: Path = groups.broadcast_object(unfinished_path(final) if groups.is_main else None)
        self._on_main(final, lambda: _try_out(beside))
        state = state_to_save(self._parts, trainer_state)
        expect_results()
        try:
            with megatron_scope():
                request = dist_checkpointing.save(
                    state, str(beside / STATE), async_sharded_save=True
                )
        except OSError as error:  # of the main rank, which writes the plain values
            remove([beside])
            raise self._failure(final, f"rank {groups.rank}: {error}", ends=True) from error
        live = self._parts.named_parameters().values()
        write = BackgroundWrite(request, beside, live)
        self._save = _Save(beside=beside, final=final, info=info, request=request, write=write)

    def complete(self) -> Path:
        """Waits for the files, then makes the folder a checkpoint and returns its path.

        Collective. Checkpoints no longer kept lose their names; they are removed in a thread.

        Raises SaveError on all ranks if any of them could not write.
        """
        save, groups = self._save, self._parts.groups
        assert save is not None
        save.write.wait()
        self._save = None
        outcomes = groups.gather_objects((save.write.entries, _told(save.write.error)))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        if errors:
            if groups.is_main:
                remove([save.beside])
            raise self._failure(save.final, "; ".join(errors))
        try:
            with megatron_scope():
                for finalize in save.request.finalize_fns:
                    finalize()
        except OSError as error:  # of the main rank, which writes the list of tensors
            # The others wait within: only an end of the run brings them back.
            remove([save.beside])
            raise self._failure(save.final, f"rank {groups.rank}: {error}", ends=True) from error
        written = {name: entry for entries, _ in outcomes for name, entry in entries.items()}
        self._on_main(save.final, lambda: self._commit(save, written))
        return save.final

    def close(self) -> None:
        """Ends what this rank's threads do: a save under way is left unfinished."""
        if self._save is not None:
            self._save.write.abandon()
            self._save = None
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _commit(self, save: _Save, written: Entries) -> None:
        """On the main rank."""
        training = self._config.training
        (save.beside / RECIPE).write_text(to_yaml(self._config))
        _copy_tokenizer(Path(self._config.data.path), save.beside / TOKENIZER)
        write_info(save.beside, save.info)
        commit(save.beside, save.final, written)
        doomed = retire(save.final, training.keep_last, training.milestone_interval)
        if self._removal is not None:
            self._removal.join()
        self._removal = threading.Thread(target=remove, args=(doomed,), daemon=True)
        self._removal.start()

    def _on_main(self, final: Path, work: Callable[[], object]) -> None:
        """Does it on the main rank; all ranks wait, and all raise SaveError if it cannot be done.

        Collective.
        """
        groups, error = self._parts.groups, None
        if groups.is_main:
            try:
                work()
            except OSError as caught:
                error = str(caught)
        error = groups.broadcast_object(error)
        if error is not None:
            raise self._failure(final, f"rank 0: {error}")

    def _failure(self, final: Path, causes: str, *, ends: bool = False) -> PassingError:
        """`ends` where not all ranks know, so that the run cannot go on."""
        return (PassingError if ends else SaveError)(
            f"{final} could not be written ({causes}): see that {self._folder} has room and can "
            f"be written by every rank; the same command then goes on from the checkpoint before"
        )


def _try_out(folder: Path) -> None:
    """Makes the folder and sees whether there is room for the plain values; raises OSError."""
    (folder / STATE).mkdir(parents=True)
    trial = folder / "trial"
    try:
        with trial.open("wb") as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        trial.unlink()
    except OSError:
        remove([folder])
        raise


def _told(error: BaseException | None) -> str | None:
    """What the file system said, if it did: torch reports some of its errors as others."""
    link = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    return None if error is None else f"{type(error).__name__}: {error}"


def _copy_tokenizer(data: Path, target: Path) -> None:
    """Evaluation and generation need the tokenizer, and the data may be elsewhere by then."""
    target.mkdir()
    for name in (META_FILE, TOKENIZER_FILE):
        if (data / name).exists():
            shutil.copy2(data / name, target / name)
