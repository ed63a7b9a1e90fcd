"""`compare` of evaluations: tables, files, and the MLflow run."""

import pytest

from ttt_megatron.cli.main import main
from ttt_megatron.evaluation.report import read_report
from ttt_megatron.tracking.state import read_tracking


@pytest.fixture(scope="module")
def evaluations(trained_run, tmp_path_factory):
    """The run's evaluation, and the control's over the same documents."""
    root = tmp_path_factory.mktemp("evaluations")
    for name, run in (("ours", trained_run.output), ("plain", trained_run.control)):
        assert main(["evaluate", str(run), "--output", str(root / name)]) == 0
    return root


def test_tables_files_and_mlflow(evaluations, trained_run, capsys, tmp_path):
    from mlflow.tracking import MlflowClient

    capsys.readouterr()
    words = [f"a=b={evaluations / 'ours'}", str(evaluations / "plain" / "by_position.json")]
    options = ["--output", str(tmp_path), "--log-to", str(trained_run.output)]
    assert main(["compare", *words, *options]) == 0
    printed = capsys.readouterr().out
    joined = read_report(tmp_path / "comparison.json")
    assert list(joined.curves) == ["on, a=b", "off, a=b", "off, control"]
    assert f"{joined.mean('on, a=b', 1).mean:.2f}" in printed
    assert "on, a=b is below off, a=b in " in printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "| on, a=b |" in (tmp_path / "comparison.md").read_text()
    tracked = read_tracking(trained_run.output)
    client = MlflowClient(tracking_uri=tracked["uri"])
    artifacts = [item.path for item in client.list_artifacts(tracked["run_id"], "evaluation")]
    assert {"evaluation/comparison.png", "evaluation/comparison.md"} <= set(artifacts)


def test_what_cannot_be_compared_is_refused(evaluations, trained_run, capsys, tmp_path):
    ours, plain = str(evaluations / "ours"), str(evaluations / "plain")
    for words, message in (
        ([ours, ours], "two evaluations are called 'run'"),
        ([ours, str(tmp_path)], "evaluate"),
        ([ours, "--log-to", plain], "add --output"),
        ([ours, "--output", str(tmp_path), "--log-to", str(trained_run.control)], "no MLflow run"),
    ):
        assert main(["compare", *words]) == 2
        assert message in capsys.readouterr().err
