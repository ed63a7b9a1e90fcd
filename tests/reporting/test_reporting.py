"""Reports of trained and evaluated runs, and what is said of those that are not."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from sweeps.sweep_files import read_points, train, write_sweep

from ttt_megatron.cli.main import main
from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.statistics import BucketSums
from ttt_megatron.reporting.document import make_report
from ttt_megatron.reporting.runs import find_subjects
from ttt_megatron.reporting.seeds import SeedCurve


def _evaluate(run, *words):
    assert main(["evaluate", str(run), "--batch", "8", *words]) == 0


@pytest.fixture(scope="module")
def swept(trained_run, tmp_path_factory):
    """Two seeds of two modes, trained and evaluated by position. Read only."""
    folder = tmp_path_factory.mktemp("reported")
    path = write_sweep(folder, trained_run.data, axes={"inner.mode": ["meta", "off"]}, seeds=[1, 2])
    _, points, output = read_points(path)
    train(points)
    for point in points:
        _evaluate(point.folder)
    # The sweep's table, with nothing left to run.
    assert main(["sweep", str(path)]) == 0
    return output


def test_seeds_are_put_together(swept, tmp_path, capsys):
    capsys.readouterr()
    assert main(["report", str(swept), "--output", str(tmp_path), "--title", "Modes"]) == 0
    assert str(tmp_path / "report.md") in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    subjects = find_subjects([str(swept)])
    assert [group.label for group in subjects.groups] == ["sweep-mode-meta", "sweep-mode-off"]
    assert [len(group.runs) for group in subjects.groups] == [2, 2]
    facts = next(line for line in text.splitlines() if line.startswith("| sweep-mode-meta | 1, 2 "))
    assert "| 3 | 384 |" in facts
    totals = []
    for run in subjects.groups[0].runs:
        data = json.loads((run.folder / "evaluation" / "by_position.json").read_text())
        totals.append(data["curves"]["on"]["total"]["mean"])
    line = next(x for x in text.splitlines() if x.startswith("| sweep-mode-meta, on |"))
    mean, error = sum(totals) / 2, abs(totals[0] - totals[1]) / 2
    assert line.endswith(f"| {mean:.3f} ± {error:.3f} |")
    document = make_report(subjects, "t", None)
    assert document.metrics["position/sweep-mode-meta, on"] == pytest.approx(mean)
    assert re.search(r"^\| sweep-mode-off \| [+-]", text, re.M), "its only way needs no name"
    assert "## Ablation: sweep" in text
    assert "4 runs without loss by context length:" in text
    run = subjects.runs[0].folder
    assert f"ttt-megatron evaluate {run} --task context\n" in text
    assert f"ttt-megatron evaluate {run} --task decode --judge MODEL\n" in text


def test_differences_over_seeds_and_documents():
    generator = np.random.default_rng(0)
    counts = np.full((5, 2), 8)
    nll = [BucketSums(8 * generator.random((5, 2)), counts) for _ in range(3)]
    one, other, third = (SeedCurve(seeds={seed: each}) for seed, each in enumerate(nll))
    paired = one.difference(other, 0)
    gaps = (nll[0].nll[:, 0] - nll[1].nll[:, 0]) / 8
    assert paired.mean == pytest.approx(gaps.mean())
    assert paired.standard_error == pytest.approx(gaps.std(ddof=1) / 5**0.5)
    both = SeedCurve(seeds={0: nll[0], 1: nll[1]})
    means = [each.nll.sum() / 80 for each in nll]
    assert both.mean(None).mean == pytest.approx((means[0] + means[1]) / 2)
    assert both.mean(None).standard_error == pytest.approx(abs(means[0] - means[1]) / 2)
    # Where one has a seed more, only the shared ones are compared.
    of_first_seed = SeedCurve(seeds={0: nll[2]})
    assert both.difference(of_first_seed, 0) == one.difference(of_first_seed, 0)
    assert of_first_seed.difference(both, 0) == of_first_seed.difference(one, 0)
    assert third.difference(both, 0).mean == pytest.approx(
        (nll[2].nll - (nll[0].nll + nll[1].nll) / 2)[:, 0].mean() / 8
    )
    gaps = (nll[2].nll - (nll[0].nll + nll[1].nll) / 2)[:, 0] / 8
    assert third.difference(both, 0).standard_error == pytest.approx(gaps.std(ddof=1) / 5**0.5)
    swapped = SeedCurve(seeds={0: nll[2], 1: nll[0]})
    gaps = [means[0] - means[2], means[1] - means[0]]
    paired = both.difference(swapped, None)
    assert paired.mean == pytest.approx(sum(gaps) / 2)
    assert paired.standard_error == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    apart = both.difference(SeedCurve(seeds={2: nll[2], 3: nll[0]}), None)
    assert apart.mean == pytest.approx(paired.mean)


def test_what_was_read_of_other_documents_is_refused(swept, tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for source, copy in zip(("mode-meta_seed-1", "mode-off_seed-1"), runs, strict=True):
        shutil.copytree(swept / "points" / source, copy)
    _evaluate(runs[1], "--documents", "2")
    with pytest.raises(UserError) as caught:
        make_report(find_subjects([f"a={runs[0]}", f"b={runs[1]}"]), "t", None)
    assert "did not measure the same, but differ in documents" in str(caught.value)
    assert str(runs[1] / "evaluation" / "by_position.json") in str(caught.value)
    (runs[0] / "evaluation" / "by_position.json").write_text("[]")
    with pytest.raises(UserError, match="is no result of `ttt-megatron evaluate`"):
        make_report(find_subjects([str(runs[0])]), "t", None)


def test_an_evaluation_of_an_earlier_step_is_refused(swept, tmp_path):
    shutil.copytree(swept / "points" / "mode-off_seed-1", tmp_path / "run")
    path = tmp_path / "run" / "evaluation" / "by_position.json"
    data = json.loads(path.read_text())
    data["about"]["step"] = 2
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="is of step 2, and the newest checkpoint of step 3"):
        make_report(find_subjects([str(tmp_path / "run")]), "t", None)


def test_runs_of_equal_seeds_are_not_put_together(swept, tmp_path):
    source = swept / "points" / "mode-off_seed-1"
    shutil.copytree(source, tmp_path / "copy")
    subjects = find_subjects([str(source), f"again={tmp_path / 'copy'}"])
    assert [len(group.runs) for group in subjects.groups] == [1, 1]
    assert subjects.named == subjects.runs
    other = replace(subjects.runs[0], label="x")
    assert other.label != subjects.runs[0].label


def test_later_stages_of_seeds_are_put_together(swept, tmp_path, capsys):
    folders = []
    for seed in (1, 2):
        start, folder = swept / "points" / f"mode-off_seed-{seed}", tmp_path / f"later-seed{seed}"
        settings = {
            "inner.mode": "off",
            "training.init_from": start,
            "training.output": folder,
            "training.steps": 1,
            "training.seed": seed,
            "data.seed": seed,
            "name": f"later-seed{seed}",
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        assert main(["train", str(swept.parent / "base.yaml"), *words]) == 0
        folders.append(str(folder))
    [group] = find_subjects(folders).groups
    assert (group.label, len(group.runs)) == ("later", 2)
    other = find_subjects([*folders, str(swept / "points" / "mode-off_seed-1")])
    assert [len(group.runs) for group in other.groups] == [2, 1]


def test_a_label_leaves_the_seed_out_where_it_stands_for_one_group(swept):
    meta, off = (swept / "points" / f"mode-{mode}_seed-1" for mode in ("meta", "off"))
    subjects = find_subjects([f"x-seed1={meta}", f"y-seed1={off}"])
    assert [group.label for group in subjects.groups] == ["x", "y"]
    subjects = find_subjects([f"x-seed1={meta}", f"x-seed2={off}"])
    assert [group.label for group in subjects.groups] == ["x-seed1", "x-seed2"]
