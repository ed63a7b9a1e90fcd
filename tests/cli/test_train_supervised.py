"""Starting a training again, with a stand-in for the training itself."""

import argparse
import sys
from pathlib import Path

import pytest

from ttt_megatron.cli.train_supervised import supervise

# Writes no event, as on a full disk. The first attempt ends before it has put anything aside.
TRAIN = """#!/bin/sh
cd {folder}
echo "$@" >>given
attempt=$TTT_MEGATRON_ATTEMPT
[ "$attempt" = 0 ] && exit 1
case "$*" in
*--fresh*) mkdir -p previous && mv checkpoints previous/checkpoints-$attempt ;;
esac
mkdir -p checkpoints/step-$attempt
echo '{{"files": {{}}}}' >checkpoints/step-$attempt/manifest.json
[ "$attempt" = 4 ]
"""


def _supervise(folder: Path, monkeypatch: pytest.MonkeyPatch, *, fresh: bool) -> int:
    train = folder / "train"
    train.write_text(TRAIN.format(folder=folder))
    train.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(train))
    args = argparse.Namespace(
        recipe="run.yaml", overrides=[], fresh=fresh, max_restarts=1, restart_wait=0.01
    )
    return supervise(args, folder)


def test_a_fresh_run_is_put_aside_once_and_its_own_progress_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "checkpoints" / "step-100"
    old.mkdir(parents=True)
    (old / "manifest.json").write_text('{"files": {}}')
    assert _supervise(tmp_path, monkeypatch, fresh=True) == 0
    given = (tmp_path / "given").read_text().splitlines()
    assert ["--fresh" in line for line in given] == [True, True, False, False, False]
    assert [path.name for path in (tmp_path / "previous").iterdir()] == ["checkpoints-1"]
    assert (tmp_path / "previous" / "checkpoints-1" / "step-100").is_dir()


def test_a_run_that_goes_on_counts_from_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "checkpoints" / "step-100"
    old.mkdir(parents=True)
    (old / "manifest.json").write_text('{"files": {}}')
    assert _supervise(tmp_path, monkeypatch, fresh=False) == 1
    given = (tmp_path / "given").read_text().splitlines()
    assert ["--fresh" in line for line in given] == [False, False]
