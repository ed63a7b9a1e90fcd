"""Runs that were not online: kept, and uploaded by a command, two stages under one parent."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from small_run import losses, small_run

from ttt_megatron.cli.main import main
from ttt_megatron.training.run import run_training

PARENT = "mlflow.parentRunId"


def _history(client: MlflowClient, run: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run, "loss"))


def test_offline_stages_killed_and_uploaded_later(
    data: Path,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"tracking__mlflow": True, "tracking__offline": True}
    config = small_run(data, one, training__save_interval=2, **settings)
    run_training(config)
    # As after a kill between steps 4 and 6, with the journal's last line half written.
    shutil.rmtree(one / "checkpoints" / "step-00000006")
    with (one / "tracking.jsonl").open("a") as file:
        file.write('{"kind": "metr')
    caplog.clear()
    run_training(config)
    assert "of steps 1 to 6 still to upload: ttt-megatron upload" in caplog.text
    run_training(small_run(data, two, training__init_from=str(one), **settings))
    assert not (one / "mlflow.json").exists()

    # The second stage first, then both, then once more.
    assert main(["upload", str(two)]) == 0
    assert main(["upload", str(one), str(two), str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["upload", str(one), "--dry-run"]) == 0
    assert "0 records to upload" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ttt-megatron").experiment_id
    runs = client.search_runs([experiment])
    assert len(runs) == 3
    (parent,) = [run for run in runs if PARENT not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert {r.data.tags[PARENT] for r in runs if r is not parent} == {parent.info.run_id}
    for folder, restarts in ((one, "1"), (two, "0")):
        run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["restarts"] == restarts
        # Steps 5 and 6 were trained twice, to the same bits.
        assert _history(client, run_id) == sorted(losses(folder).items())
        assert "dashboard.html" in {file.path for file in client.list_artifacts(run_id)}


def test_a_run_without_mlflow_is_uploaded_from_its_metrics(
    data: Path,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    run = tmp_path / "run"
    run_training(small_run(data, run))
    assert not (run / "tracking.jsonl").exists()
    assert main(["upload", str(run), "--dry-run"]) == 0
    assert "not in MLflow at all" in capsys.readouterr().out
    assert main(["upload", str(run), "--to", "http://127.0.0.1:9"]) == 1
    assert "still to upload" in capsys.readouterr().err
    assert main(["upload", str(run)]) == 0
    assert main(["upload", str(run)]) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    assert _history(client, run_id) == sorted(losses(run).items())
    found = client.get_run(run_id)
    assert found.data.params["training.steps"] == "6"
    assert found.info.status == "FINISHED"
    times = [m.timestamp for m in client.get_metric_history(run_id, "loss")]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_what_is_no_run_and_a_password_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upload", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    assert main(["upload", str(tmp_path), "--to", "http://me:s3cret@host"]) == 2
    told = capsys.readouterr().err
    assert "--to holds a user name" in told
    assert "s3cret" not in told
