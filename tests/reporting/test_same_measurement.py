"""Reports refuse needles, decoded text and checks for leakage that were not measured alike."""

import json
import shutil

import pytest

from ttt_megatron.cli.main import main
from ttt_megatron.errors import UserError
from ttt_megatron.reporting.document import make_report
from ttt_megatron.reporting.runs import find_subjects

_SHARED = ["--length", "64", "--documents", "3"]
_OPTIONS = {
    "needle": [
        *("--lengths", "256", "--depths", "0,100", "--samples", "2", "--needles", "1"),
        *("--score", "choice", "--answers", "3"),
    ],
    "decode": [*_SHARED, "--prefill", "8", "--decode", "4"],
    "leakage": [*_SHARED, "--last", "16"],
}


def _evaluate(run, task, *changed):
    judge = ["--judge", str(run)] if task == "decode" else []
    words = ["--task", task, *_OPTIONS[task], *judge, "--batch", "8", *changed]
    assert main(["evaluate", str(run), *words]) == 0


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory):
    """A plain model's run, evaluated by all three tasks. Read only."""
    run = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(trained_run.control, run, ignore=shutil.ignore_patterns("evaluation"))
    for task in _OPTIONS:
        _evaluate(run, task)
    return run


@pytest.fixture
def pair(evaluated, tmp_path):
    """Two copies of it."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        shutil.copytree(evaluated, run)
    return runs


def _report(runs):
    return make_report(find_subjects([f"{run.name}={run}" for run in runs]), "t", None)


def test_what_was_measured_alike_stands_side_by_side(pair):
    sections = {section.title: section.markdown() for section in _report(pair).sections}
    for title in ("Needles in haystacks", "Decoded text under a judge", "Checks for leakage"):
        assert {"| a, off", "| b, off"} <= {line[:8] for line in sections[title].splitlines()}
    # The report counts again what the evaluation counted.
    values = json.loads((pair[0] / "evaluation" / "needle.json").read_text())
    counted = values["ways"]["off"]["by_reach"]["S-NIAH-1"]["outside"]
    cell = f"{counted['mean']:.2f} ± {counted['standard_error']:.2f}"
    assert f"| a, off, S-NIAH-1 | 0% | - | {cell} |" in sections["Needles in haystacks"]


@pytest.mark.parametrize(
    ("task", "changed", "said"),
    [
        (
            "needle",
            ["--samples", "1", "--seed", "1", "--lengths", "260", "--depths", "0"],
            "lengths (260 and 256), depths (0% and 0%, 100%), samples (1 and 2), seed (1 and 0): ",
        ),
        (
            "needle",
            ["--needles", "1,3", "--lengths", "300", "--answers", "4"],
            "needles (S-NIAH-1, S-NIAH-3 and S-NIAH-1), lengths (300 and 256), answers (4 and 3): ",
        ),
        ("decode", ["--seed", "1", "--decode", "5"], "decoded (5 and 4), seed (1 and 0): "),
        ("decode", ["--documents", "2"], "differ in documents"),
        ("leakage", ["--last", "8"], "last (8 and 16): "),
        ("leakage", ["--length", "72"], "length (72 and 64): "),
    ],
)
def test_what_was_measured_otherwise_is_refused(pair, task, changed, said):
    _evaluate(pair[1], task, *changed)
    with pytest.raises(UserError) as caught:
        _report(pair)
    files = [str(run / "evaluation" / f"{task}.json") for run in reversed(pair)]
    assert str(caught.value).startswith(" and ".join(files))
    assert said in str(caught.value)
    assert "evaluate both with the same data and --" in str(caught.value)


@pytest.mark.parametrize("task", list(_OPTIONS))
def test_what_was_measured_on_other_data_is_refused(pair, task):
    path = pair[1] / "evaluation" / f"{task}.json"
    values = json.loads(path.read_text())
    values["about"]["data_fingerprint"] = "0" * 64
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="did not measure the same, but differ in data: "):
        _report(pair)
