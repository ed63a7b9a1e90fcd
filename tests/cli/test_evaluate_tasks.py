"""`evaluate --task` of a trained run: files of every task, its figures in MLflow, and refusals."""

import json

import pytest

from ttt_megatron.cli.main import main
from ttt_megatron.tracking.state import read_tracking


def evaluate(*arguments):
    return main(["evaluate", *map(str, arguments)])


def read(folder, task):
    assert {x.suffix for x in folder.glob(f"{task}.*")} == {".json", ".md", ".png"}
    return json.loads((folder / f"{task}.json").read_text())


def test_two_tasks_of_three_models_in_one_call(trained_run, tmp_path, capsys):
    from mlflow.tracking import MlflowClient

    options = ["--control", trained_run.control, "--reference", trained_run.control]
    tasks = ["--task", "context", "--task", "leakage", "--documents", 4, "--last", 8]
    assert evaluate(trained_run.output, *options, *tasks, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    context = read(tmp_path, "context")
    assert list(context["curves"]) == ["on", "off", "control", "reference"]
    assert context["contexts"] == [64]
    assert context["reference"] == "reference"
    # Control and reference are one model here, so nothing lies between them.
    assert context["curves"]["control"]["differences"][0]["mean"] == 0
    assert context["curves"]["on"]["differences"][0]["mean"] != 0
    leakage = read(tmp_path, "leakage")
    assert all(way["holds"] for way in leakage["ways"].values())
    assert [use["kept"] for use in leakage["ways"]["on"]["content"]] == [0, 16]
    assert "no leak" in printed
    tracked = read_tracking(trained_run.output)
    client = MlflowClient(tracking_uri=tracked["uri"])
    logged = client.get_run(tracked["run_id"]).data.metrics
    mean = context["curves"]["on"]["means"][0]["mean"]
    assert logged["evaluation/context/on/64"] == pytest.approx(mean)
    artifacts = [x.path for x in client.list_artifacts(tracked["run_id"], "evaluation")]
    assert {"evaluation/context.png", "evaluation/leakage.md"} <= set(artifacts)


def test_needles(trained_run, tmp_path, capsys):
    options = ["--lengths", "270,280", "--depths", "0", "--samples", 1, "--needles", "1,2"]
    score = ["--score", "choice", "--answers", 3]
    arguments = [trained_run.output, "--task", "needle", *options, *score, "--output", tmp_path]
    assert evaluate(*arguments) == 0
    needle = read(tmp_path, "needle")
    assert list(needle["ways"]) == ["on", "off"]
    cells = needle["ways"]["on"]["cells"]
    assert {cell["task"] for cell in cells} == {"S-NIAH-1", "S-NIAH-2"}
    assert {cell["length"] for cell in cells} == {270, 280}
    assert {cell["place"] for cell in cells} == {0.0, "near", "removed"}
    assert needle["ways"]["on"]["by_reach"]["S-NIAH-1"]["share_inside"] == 0
    assert "chance 0.33" in capsys.readouterr().out


def test_decoding_judged_by_itself_and_by_an_export(trained_run, exported_run, tmp_path, capsys):
    options = ["--task", "decode", "--documents", 2, "--prefill", 20, "--decode", 9]
    means = []
    for judge in (trained_run.output, exported_run):
        arguments = [trained_run.output, *options, "--judge", judge, "--output", tmp_path]
        assert evaluate(*arguments) == 0
        found = read(tmp_path, "decode")
        assert found["unit"] == "token"
        assert list(found["judgements"]) == ["on", "off", "held-out text"]
        means.append(found["judgements"]["on"]["mean"]["mean"])
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    assert "decoded text under the judge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "decode"], "give one with --judge"),
        (["--judge", "x"], "--judge x belongs to --task decode"),
        (["--task", "needle", "--last", "3"], "--last 3 belongs to --task context or leakage"),
        (["--task", "context", "--length", "5000"], "the longest in the validation split"),
        (["--task", "context", "--length", "0"], "--length 0 with --task context"),
        (["--task", "context", "--contexts", "65"], "--contexts 65 is above"),
        (["--task", "context", "--contexts", "8", "--last", "9"], "cannot hold the --last 9"),
        (["--task", "context", "--contexts", "a"], "--contexts a: give whole numbers"),
        (["--task", "context", "--last", "64"], "less than --length"),
        (["--task", "leakage", "--documents", "1"], "only 1 has 65 tokens"),
        (["--task", "leakage", "--length", "12"], "leaves no two chunks of 8"),
        (["--task", "needle", "--lengths", "64"], "--lengths 64: introduction"),
        (["--task", "needle", "--depths", "120"], "--depths"),
    ],
)
def test_input_that_makes_no_sense(trained_run, capsys, tmp_path, options, message):
    assert evaluate(trained_run.output, *options, "--output", tmp_path) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_document_too_short_is_named(trained_run, capsys):
    from ttt_megatron.data.dataset import open_dataset

    dataset = open_dataset(trained_run.data, "validation")
    longest = dataset.names[int(dataset.lengths.argmax())]
    assert evaluate(trained_run.output, "--task", "context", "--length", "5000") == 2
    assert f"{longest}, has {dataset.lengths.max():,}" in capsys.readouterr().err


def test_a_split_of_another_tokenizer_is_refused_by_every_task(trained_run, capsys, tmp_path):
    from ttt_megatron.data.prepare import PrepareOptions, prepare

    texts = tmp_path / "text"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text("other words than those " * (number + 9))
    other = str(tmp_path / "other")
    prepare(PrepareOptions(inputs=(str(texts),), output=other, tokenizer="bpe:260", workers=1))
    for task in ("context", "needle", "leakage"):
        assert evaluate(trained_run.output, "--task", task, "--data", other) == 2
        assert "prepare it with --tokenizer bytes" in capsys.readouterr().err
