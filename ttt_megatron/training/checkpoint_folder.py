"""The folder of a run's checkpoints: names, which one is the newest complete, which ones stay."""

import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ttt_megatron.config import from_dict
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.config.yaml_text import parse_yaml
from ttt_megatron.errors import UserError
from ttt_megatron.training.manifest import (
    MANIFEST,
    Entries,
    find_damage,
    sync_to_disk,
    write_manifest,
)

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
INFO = "info.json"
RECIPE = "run.yaml"
STATE = "state"
MODEL_KEY = "model"
TOKENIZER = "tokenizer"
_PREFIX = "step-"
_DAMAGED = "damaged-"
_UNFINISHED = ".tmp-"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    `step` outer steps done; `loss` the last step's (nan or inf if it was skipped), `finite` whether
    it was a number; `data_fingerprint` of the prepared data; `tracking_run` the MLflow run's id;
    `lineage` the stages that led here, (key, name) each, this run's last.
    """

    path: str
    step: int
    loss: float
    finite: bool
    data_fingerprint: str
    tracking_run: str | None = None
    lineage: Sequence[Sequence[str]] = ()


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"{_PREFIX}{step:08d}"


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Writes info.json; the path is left out, as the folder moves."""
    values = {name: value for name, value in asdict(info).items() if name != "path"}
    (folder / INFO).write_text(json.dumps(values, indent=1))


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Reads info.json; UserError if it cannot be understood."""
    try:
        return CheckpointInfo(path=str(checkpoint), **json.loads((checkpoint / INFO).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{checkpoint / INFO} cannot be read ({error}): use another checkpoint"
        ) from None


def read_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration that a checkpoint was trained with."""
    path = checkpoint / RECIPE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from None
    return from_dict(parse_yaml(text, str(path)), str(path))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first; their content is not looked at."""
    found = [
        p for p in folder.glob(f"{_PREFIX}*") if p.name[len(_PREFIX) :].isdigit() and p.is_dir()
    ]
    return sorted(found, key=_step)


def newest_complete(folder: Path, *, quick: bool = False) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; None if there is none at all.

    Damaged ones are reported. `quick` looks at the files' sizes alone, and reports nothing.
    Raises UserError if there are checkpoints and all are damaged.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = find_damage(checkpoint, hashes=not quick)
        if damage is None:
            for line in [] if quick else damaged:
                logger.warning("passed over %s; using %s", line, checkpoint.name)
            return checkpoint
        damaged.append(f"{checkpoint} ({damage})")
    if damaged:
        raise UserError(
            f"no complete checkpoint in {folder}: {'; '.join(damaged)}. "
            f"Restore one, or start over with --fresh"
        )
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that has all its files, by their sizes; -1 without one."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if find_damage(checkpoint, hashes=False) is None:
            return _step(checkpoint)
    return -1


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself or from a run's folder (its newest complete checkpoint).

    Raises UserError if there is none, or the one named is damaged.
    """
    if (path / MANIFEST).exists() or path.name.startswith(_PREFIX):
        damage = find_damage(path)
        if damage is not None:
            raise UserError(f"checkpoint {path} is damaged: {damage}. Use another one")
        return path
    folder = path / CHECKPOINTS
    checkpoint = newest_complete(folder) if folder.is_dir() else None
    if checkpoint is None:
        raise UserError(
            f"{path} holds no checkpoint: give a run's folder (training.output) or a folder "
            f"{_PREFIX}…"
        )
    return checkpoint


def unfinished_path(final: Path) -> Path:
    """A name beside `final` that no other attempt uses."""
    return final.with_name(f"{final.name}{_UNFINISHED}{uuid.uuid4().hex[:8]}")


def commit(beside: Path, final: Path, written: Entries | None = None) -> None:
    """Gives a written folder its manifest, then its final name; `written` as `write_manifest`'s."""
    write_manifest(beside, written)
    if final.exists():
        remove([_without_name(final)])
    beside.rename(final)
    sync_to_disk(final.parent)


def set_damaged_aside(folder: Path, sound: Path) -> list[Path]:
    """Renames the checkpoints later than `sound`, which were found damaged, to damaged-step-….

    They are counted and gone on from no more, and nothing of them is removed. Returns the new
    paths, oldest first.
    """
    aside = []
    for checkpoint in list_checkpoints(folder):
        if _step(checkpoint) > _step(sound):
            target, number = folder / f"{_DAMAGED}{checkpoint.name}", 1
            while target.exists():
                number += 1
                target = folder / f"{_DAMAGED}{checkpoint.name}-{number}"
            with suppress(OSError):  # left where it is, it is still not counted by `retire`
                aside.append(checkpoint.rename(target))
    return aside


def sweep(folder: Path) -> None:
    """Removes what interrupted writes left behind."""
    remove(folder.glob(f"*{_UNFINISHED}*"))


def rotate(committed: Path, keep_last: int, milestone_interval: int) -> None:
    """Removes what is not among the newest up to `committed`, no milestone, nor the last finite.

    What is later than the checkpoint just committed, or does not tell what it is, stays uncounted.
    """
    remove(retire(committed, keep_last, milestone_interval))


def retire(committed: Path, keep_last: int, milestone_interval: int) -> list[Path]:
    """Takes their names from the checkpoints that `rotate` removes; returns what is left of them.

    A half-removed folder never looks like a checkpoint.
    """
    infos: dict[Path, CheckpointInfo] = {}
    for path in list_checkpoints(committed.parent):
        if _step(path) <= _step(committed):
            with suppress(UserError):
                infos[path] = read_info(path)
    keep = {committed, *list(infos)[-keep_last:]}
    keep |= set([path for path, info in infos.items() if info.finite][-1:])
    if milestone_interval:
        keep |= {path for path, info in infos.items() if info.step % milestone_interval == 0}
    return [_without_name(path) for path in infos if path not in keep]


def remove(folders: Iterable[Path]) -> None:
    """Removes what is not needed any more; what cannot be removed is left for `sweep`."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[len(_PREFIX) :])


def _without_name(checkpoint: Path) -> Path:
    doomed = unfinished_path(checkpoint)
    return checkpoint.rename(doomed)
