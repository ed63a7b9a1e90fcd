"""`report` as a user calls it."""

import shutil

import pytest

from ttt_megatron.cli.main import main
from ttt_megatron.tracking.state import read_tracking


@pytest.fixture(scope="module")
def runs(trained_run, tmp_path_factory):
    """Copies of the run and its control, evaluated by position; the run by its other tasks too."""
    root = tmp_path_factory.mktemp("report-runs")
    for name, source in (("run", trained_run.output), ("control", trained_run.control)):
        shutil.copytree(source, root / name)
        assert main(["evaluate", str(root / name), "--batch", "8"]) == 0
    run, small = str(root / "run"), ["--length", "64", "--documents", "3", "--last", "16"]
    tasks = ["--task", "context", "--task", "leakage"]
    assert main(["evaluate", run, *tasks, *small, "--contexts", "32,64"]) == 0
    decode = ["--judge", str(root / "control"), "--prefill", "16", "--decode", "8"]
    assert main(["evaluate", run, "--task", "decode", "--documents", "3", *decode]) == 0
    needle = ["--lengths", "256", "--samples", "2", "--depths", "0,100", "--needles", "1"]
    assert main(["evaluate", run, "--task", "needle", *needle, "--score", "choice"]) == 0
    (recipe,) = (root / "run").glob("checkpoints/*/run.yaml")
    bench = ["--device", "cpu", "--only", "latency", "--lengths", "64", "--step-repeats", "1"]
    bench += ["--recipe", str(recipe), "--output", str(root / "run" / "bench")]
    assert main(["bench", *bench]) == 0
    return root


def test_everything_that_was_measured_is_there(runs, tmp_path, capsys):
    from mlflow.tracking import MlflowClient

    words = [str(runs / "run"), f"plain={runs / 'control'}"]
    options = ["--output", str(tmp_path), "--log-to", str(runs / "run"), "--reference", "plain"]
    assert main(["report", *words, *options]) == 0
    tracked = read_tracking(runs / "run")
    assert f"logged to MLflow run {tracked['run_id']}" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    for heading in ("Runs", "Loss by position", "Needles in haystacks", "Checks for leakage"):
        assert f"\n## {heading}\n" in text
    for heading in ("Decoded text under a judge", "Latency", "Not measured"):
        assert f"\n## {heading}\n" in text
    assert "**difference to plain**" in text
    assert "plain without needles in haystacks:" in text
    assert "run without" not in text
    assert "No latencies" not in text
    assert "| run, context 64 | fp32 | TTT-E2E |" in text
    client = MlflowClient(tracking_uri=tracked["uri"])
    artifacts = {item.path for item in client.list_artifacts(tracked["run_id"], "evaluation")}
    assert {"evaluation/report.md", "evaluation/report.png"} <= artifacts
    logged = client.get_run(tracked["run_id"]).data.metrics
    assert 0 < logged["evaluation/report/position/plain"] < 10


def test_what_cannot_be_reported_is_refused(runs, trained_run, tmp_path, capsys):
    run, bare = str(runs / "run"), str(trained_run.control)
    shutil.copytree(trained_run.control, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "evaluation", ignore_errors=True)
    bare = str(tmp_path / "bare")
    output = ["--output", str(tmp_path / "report")]
    for words, said in (
        ([str(tmp_path)], f"{tmp_path}: there is no such run; give a run's folder"),
        ([bare], f"{bare} has not been evaluated: run `ttt-megatron evaluate {bare}` first"),
        ([run, run], "two runs are called 'run': name them, LABEL=PATH"),
        ([run, "--reference", "other"], "--reference other is none of the runs (run)"),
        ([run, f"b={bare}", "--reference", "b"], f"--reference {bare} has not been evaluated: "),
        ([run, "--log-to", bare], f"--log-to {bare}: no MLflow run belongs to this folder"),
    ):
        assert main(["report", *words, *output]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()
