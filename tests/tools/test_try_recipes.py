"""Recipes made small: the same keys, two steps each, in one process."""

from pathlib import Path

import pytest
import try_recipes

HANDFUL = (
    "125m/extend-e2e-128k",
    "350m/pretrain-mamba2-8k",
    "760m/pretrain-gated_delta-8k",
    "1b/pretrain-hybrid-8k",
    "8b/pretrain-ttt_kvb-8k",
    "3b/pretrain-e2e_all-8k",
    "demo/stage1",
)


def test_different_ones_train_two_steps_and_a_stage_goes_on_from_its_first(tmp_path):
    trials = list(try_recipes.try_recipes(HANDFUL, tmp_path))
    assert [one.recipe for one in trials] == ["125m/pretrain-e2e-8k", *HANDFUL]
    assert [one.problem for one in trials] == [None] * len(trials)
    assert all(one.losses[1] < one.losses[0] for one in trials)
    # The extension starts from what the first stage has learnt.
    assert trials[1].losses[0] < trials[0].losses[0] - 0.05


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    broken = try_recipes.RECIPES / "125m" / "pretrain-swa-8k.yaml"
    paths = {"broken": tmp_path / "broken.yaml", "125m/pretrain-swa-8k": broken}
    paths["broken"].write_text(
        f"extends: {broken}\nmodel:\n  window_size: 1\ninner:\n  mode: meta\n"
        "training:\n  output: runs/broken\n"
    )
    monkeypatch.setattr(try_recipes, "runs", lambda: paths)
    assert try_recipes.main([]) == 1
    shown = capsys.readouterr().out
    assert "failed: broken: UserError: " in shown
    assert "inner.mode = meta needs prime MLPs" in shown
    row = next(line for line in shown.splitlines() if line.startswith("125m/pretrain-swa-8k"))
    assert row.endswith("ok")


def test_every_run_is_tried_and_nothing_else():
    names = try_recipes.runs()
    published = [name for name in names if name[0].isdigit()]
    assert len(published) == 6 * 33
    assert {"quickstart", "demo/stage1", "reproduction/stage2/swa-compute"} <= names.keys()
    assert not [name for name in names if Path(name).name in ("base", "layouts")]
    assert not [name for name in names if name.startswith("sweeps/")]


@pytest.mark.slow
def test_every_recipe_trains_two_steps(tmp_path):
    trials = list(try_recipes.try_recipes(list(try_recipes.runs()), tmp_path))
    assert [f"{one.recipe}: {one.problem}" for one in trials if one.problem] == []
