"""`evaluate` of a trained run: table, files, and the MLflow run."""

import json
import shutil

import pytest
import torch

from ttt_megatron.cli.main import main
from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.validation import validation_sequences
from ttt_megatron.evaluation.report import read_report
from ttt_megatron.tracking.state import read_tracking
from ttt_megatron.training.weights import load_learner


def test_curves_files_and_mlflow(trained_run, capsys):
    from mlflow.tracking import MlflowClient

    options = ["--control", str(trained_run.control), "--batch", "4"]
    assert main(["evaluate", str(trained_run.output), *options]) == 0
    printed = capsys.readouterr().out
    folder = trained_run.output / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == [
        "by_position.json",
        "by_position.md",
        "by_position.png",
    ]
    report = read_report(folder / "by_position.json")
    assert list(report.curves) == ["on", "off", "control"]
    assert [(b.start, b.stop) for b in report.buckets] == [(0, 32), (32, 64)]
    assert f"{report.mean('on', 1).mean:.3f}" in printed
    # The same documents, read by hand.
    learner, *_ = load_learner(trained_run.output)
    batch = validation_sequences(open_dataset(trained_run.data, "validation"), 64, 64).batch(0, 64)
    for name, inner_steps in (("on", True), ("off", False)):
        with torch.no_grad():
            output = learner(batch.tokens, batch.targets, batch.mask, inner_steps=inner_steps)
        late = output.token_nll[:, 32:].double().mean()
        assert report.mean(name, 1).mean == pytest.approx(late.item(), rel=1e-5)
    assert report.mean("on").documents == len(batch) > 3
    # A byte is a token here, so bits a byte are the loss in other units.
    bits = report.bits_per_byte("on").mean
    assert bits == pytest.approx(report.mean("on").mean / 0.6931471805599453)
    tracked = read_tracking(trained_run.output)
    client = MlflowClient(tracking_uri=tracked["uri"])
    logged = client.get_run(tracked["run_id"]).data.metrics
    assert logged["evaluation/on/total"] == pytest.approx(report.mean("on").mean)
    artifacts = [item.path for item in client.list_artifacts(tracked["run_id"], "evaluation")]
    assert "evaluation/by_position.png" in artifacts


def test_a_store_that_cannot_be_reached_is_only_warned_about(trained_run, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run.output, run)
    (run / "mlflow.json").write_text(json.dumps({"uri": "http://127.0.0.1:9", "run_id": "0" * 32}))
    options = ["--length", "0", "--documents", "2", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(run), *options]) == 0
    captured = capsys.readouterr()
    assert "logged to MLflow" not in captured.out
    report = read_report(tmp_path / "out" / "by_position.json")
    assert report.about["length"] is None
    assert report.mean("on").documents == 2
    assert report.buckets[-1].stop > 64


def test_a_plain_model_has_one_curve(trained_run, capsys, tmp_path):
    assert main(["evaluate", str(trained_run.control), "--output", str(tmp_path)]) == 0
    assert list(read_report(tmp_path / "by_position.json").curves) == ["off"]


def test_input_that_makes_no_sense(trained_run, capsys, tmp_path):
    from ttt_megatron.data.prepare import PrepareOptions, prepare

    run = str(trained_run.output)
    assert main(["evaluate", run, "--batch", "0"]) == 2
    assert "--batch 0" in capsys.readouterr().err
    assert main(["evaluate", run, "--length", "100000"]) == 2
    assert "evaluate at a shorter length" in capsys.readouterr().err
    texts = tmp_path / "text"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text("another tokenizer " * (number + 9))
    other = str(tmp_path / "other")
    options = PrepareOptions(inputs=(str(texts),), output=other, tokenizer="bpe:260", workers=1)
    prepare(options)
    assert main(["evaluate", run, "--data", other]) == 2
    assert "prepare it with --tokenizer bytes" in capsys.readouterr().err
