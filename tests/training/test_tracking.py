"""MLflow: one run through a resume, and no harm from a server that is away."""

import json
import logging
import socket
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from small_run import losses, small_run

from ttt_megatron.tracking.store import tracking_uri
from ttt_megatron.training.run import run_training


def test_a_resumed_run_continues_its_mlflow_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = small_run(data, tmp_path / "run", tracking__mlflow=True, training__save_interval=2)
    first = run_training(config)
    assert first.tracking_store == f"sqlite:///{tmp_path / 'mlflow.db'}"
    # As after a kill between steps 4 and 6.
    import shutil

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    second = run_training(config)
    assert second.tracking_run == first.tracking_run is not None
    client = MlflowClient(tracking_uri=first.tracking_store)
    run = client.get_run(first.tracking_run)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.steps"] == "6"
    assert run.data.tags["checkpoint"] == second.checkpoint
    assert run.data.tags["kernels"].startswith("torch (")
    assert run.data.tags["AdamW"].startswith("torch (")
    history = {m.step: m.value for m in client.get_metric_history(first.tracking_run, "loss")}
    assert history == losses(tmp_path / "run")
    wanted = {"first_chunk_loss", "last_chunk_loss", "inner_grad_norm", "clipped_share", "drift"}
    wanted |= {"grad_norm", "learning_rate", "inner_learning_rate", "tokens_per_second"}
    assert wanted <= run.data.metrics.keys()
    artifacts = {file.path for file in client.list_artifacts(first.tracking_run)}
    assert artifacts == {"run.yaml", "loss.png", "dashboard.html", "dashboard.png"}
    info = json.loads((Path(str(second.checkpoint)) / "info.json").read_text())
    assert info["tracking_run"] == first.tracking_run


def test_a_server_that_is_away_is_said_once_and_costs_seconds(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        config = small_run(
            data, tmp_path / "run", tracking__mlflow=True, tracking__tracking_uri=uri
        )
        start = time.monotonic()
        with caplog.at_level(logging.WARNING, "ttt_megatron"):
            run_training(config)
    assert len(losses(tmp_path / "run")) == 6
    assert time.monotonic() - start < 30
    said = [record for record in caplog.records if uri in record.getMessage()]
    assert len(said) == 1


def test_the_store_is_the_recipes_then_the_environments(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small_run(data, tmp_path / "runs" / "a").tracking
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(plain, tmp_path / "runs" / "a").endswith("/runs/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert tracking_uri(plain, tmp_path) == "http://tracking.example:5000"
    named = small_run(data, tmp_path, tracking__tracking_uri="file:here").tracking
    assert tracking_uri(named, tmp_path) == "file:here"
