import math
from pathlib import Path

import pytest

from ttt_megatron.errors import UserError
from ttt_megatron.training.checkpoint_folder import (
    CheckpointInfo,
    checkpoint_name,
    commit,
    list_checkpoints,
    newest_complete,
    newest_step,
    read_info,
    resolve_checkpoint,
    rotate,
    set_damaged_aside,
    sweep,
    unfinished_path,
    write_info,
)
from ttt_megatron.training.manifest import MANIFEST


def _checkpoint(folder: Path, step: int, loss: float = 1.0) -> Path:
    final = folder / checkpoint_name(step)
    beside = unfinished_path(final)
    (beside / "state").mkdir(parents=True)
    (beside / "state" / "weights").write_bytes(bytes([step]) * 1000)
    info = CheckpointInfo(
        path="", step=step, loss=loss, finite=math.isfinite(loss), data_fingerprint="f"
    )
    write_info(beside, info)
    commit(beside, final)
    return final


def _steps(folder: Path) -> list[int]:
    return [read_info(path).step for path in list_checkpoints(folder)]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "garble"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _checkpoint(tmp_path, 5)
    newest = _checkpoint(tmp_path, 10)
    weights = newest / "state" / "weights"
    if damage == "flip":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        (newest / MANIFEST).unlink()
    else:
        (newest / MANIFEST).write_text("{")
    assert newest_complete(tmp_path) == tmp_path / checkpoint_name(5)
    assert newest.name in caplog.text
    with pytest.raises(UserError, match=newest.name):
        resolve_checkpoint(newest)


def test_all_damaged_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    (_checkpoint(tmp_path, 1) / MANIFEST).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest_complete(tmp_path)


def test_rotation_keeps_the_newest_milestones_and_the_last_finite(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        _checkpoint(tmp_path, step, loss=math.nan if step >= 40 else 2.0)
        rotate(tmp_path / checkpoint_name(step), keep_last=2, milestone_interval=20)
    assert _steps(tmp_path) == [20, 30, 40, 50]
    rotate(_checkpoint(tmp_path, 60), keep_last=1, milestone_interval=0)
    assert _steps(tmp_path) == [60]


def test_rotation_spares_the_one_just_written_what_is_later_and_what_does_not_tell(
    tmp_path: Path,
) -> None:
    for step in (100, 120, 200):
        _checkpoint(tmp_path, step)
    (tmp_path / checkpoint_name(120) / "info.json").write_text("{")
    rotate(_checkpoint(tmp_path, 137), keep_last=1, milestone_interval=0)
    left = [path.name for path in list_checkpoints(tmp_path)]
    assert left == [checkpoint_name(step) for step in (120, 137, 200)]


def test_damaged_checkpoints_are_set_aside_and_count_no_more(tmp_path: Path) -> None:
    sound = _checkpoint(tmp_path, 100)
    for _ in range(2):
        damaged = _checkpoint(tmp_path, 200) / "state" / "weights"
        damaged.write_bytes(b"cut")
        [aside] = set_damaged_aside(tmp_path, sound)
        assert (aside / "state" / "weights").read_bytes() == b"cut"
    assert _steps(tmp_path) == [100]
    assert len(list(tmp_path.glob("damaged-step-00000200*"))) == 2
    assert set_damaged_aside(tmp_path, sound) == []
    assert newest_step(tmp_path) == 100
    sweep(tmp_path)
    rotate(_checkpoint(tmp_path, 137), keep_last=1, milestone_interval=0)
    assert newest_complete(tmp_path) == tmp_path / checkpoint_name(137)
    assert len(list(tmp_path.glob("damaged-*"))) == 2


def test_what_an_interrupted_write_left_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    left = unfinished_path(tmp_path / checkpoint_name(10))
    left.mkdir()
    (left / "weights").write_bytes(b"half")
    assert newest_complete(tmp_path) == tmp_path / checkpoint_name(5)
    sweep(tmp_path)
    assert not left.exists()
    assert _steps(tmp_path) == [5]


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)
