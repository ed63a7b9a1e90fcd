"""`ttt-megatron plan`."""

import json
from pathlib import Path

import pytest

from ttt_megatron.cli.main import main

RECIPE = str(Path(__file__).parents[2] / "recipes" / "350m" / "extend-e2e-32k.yaml")


def test_plan_prints_tables_and_writes_files(tmp_path, capsys):
    data, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["plan", RECIPE, "--gpus", "16", "--gpu", "a100-80", "--top", "2"]
    files = ["--json", str(data), "--png", str(picture)]
    assert main([*arguments, *files, "training.global_batch_size=8"]) == 0
    printed = capsys.readouterr().out
    for words in ("assumed to be reached", "tokens/s", "fast-weight history", "GB sent", "waiting"):
        assert words in printed
    written = json.loads(data.read_text())
    assert written["gpus"] == 16
    assert len(written["best"]) == 2
    best = written["best"][0]
    assert best["fits"]
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert f"1: {' '.join(best['overrides'])}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--gpu", "abacus"], "known GPUs are"),
        (["--gpus", "37"], "no layout divides 37 GPUs"),
        (["--hardware", "memory_gib=3"], "no layout of 1 x h100 fits"),
        (["--json", "nowhere/plan.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, message, capsys):
    assert main(["plan", RECIPE, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
