"""Against a real `mlflow server` that is killed, comes back, or asks who is there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from tracking.mlflow_server import ADMIN, ADMIN_PASSWORD, Server
from training.small_run import SETTINGS, losses, make_data

pytestmark = pytest.mark.server

_STEPS = 120
# A loaded machine takes its time.
_PATIENCE = 900
_PROGRAM = (sys.executable, "-m", "ttt_megatron.cli.main")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One without log-in; PostgreSQL's if TEST_POSTGRESQL_URI names an empty database."""
    backend = None
    if request.param == "postgresql":
        backend = os.environ.get("TEST_POSTGRESQL_URI")
        if backend is None:
            pytest.skip("TEST_POSTGRESQL_URI names no database")
    made = Server(tmp_path_factory.mktemp("server"), backend=backend)
    made.start()
    yield made
    made.kill()


class Training:
    """`ttt-megatron train` in processes of its own."""

    def __init__(self, folder: Path, data: Path, name: str) -> None:
        values = {section: dict(settings) for section, settings in SETTINGS.items()}
        values["data"]["path"] = str(data)
        values["training"] |= {
            "steps": _STEPS,
            "save_interval": 20,
            "output": str(folder / name),
        }
        values["tracking"] = {"progress": False, "experiment": name}
        self.recipe = folder / f"{name}.yaml"
        self.recipe.write_text(yaml.safe_dump({"name": name, **values}))
        self.output = folder / name
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_PROGRAM, "train", str(self.recipe)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**clean, **environment},
                start_new_session=True,
            )

    def wait_for(self, step: int) -> None:
        """Until that step is done."""
        end = time.monotonic() + _PATIENCE
        while self.step < step:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.02)

    @property
    def step(self) -> int:
        return len(losses(self.output)) if (self.output / "metrics.jsonl").exists() else 0

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        assert self.process is not None
        assert self.process.wait(_PATIENCE) == 0, self.log.read_text()[-3000:]
        return self.log.read_text()


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Makes trainings, and leaves none behind."""
    made: list[Training] = []

    def make(name: str) -> Training:
        made.append(Training(tmp_path, data, name))
        return made[-1]

    yield make
    for training in made:
        if training.process is not None and training.process.poll() is None:
            training.kill()


def _upload(output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    return subprocess.run(
        [*_PROGRAM, "upload", str(output)],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **environment},
    )


def _check_whole(client: MlflowClient, training: Training, restarts: int) -> Any:
    """One MLflow run, with every step's loss once."""
    experiment = client.get_experiment_by_name(training.recipe.stem)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == sorted(losses(training.output).items())
    assert [m.step for m in sorted(history, key=lambda m: m.step)] == list(range(1, _STEPS + 1))
    assert run.info.status == "FINISHED"
    assert run.data.tags["restarts"] == str(restarts)
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"run.yaml", "loss.png", "dashboard.html", "dashboard.png"} <= artifacts
    return run


def test_mlflow_takes_equal_metrics_as_one(server: Server) -> None:
    client = MlflowClient(tracking_uri=server.uri)
    run = client.create_run(client.create_experiment(f"equal-{server.port}")).info.run_id
    both = [Metric("loss", 1 / 3, 1000, 1), Metric("loss", 2 / 3, 2000, 2)]
    for _ in range(3):
        client.log_batch(run, metrics=both)
    client.log_batch(run, metrics=[*both[1:], Metric("loss", 1.5, 3000, 3)])
    history = client.get_metric_history(run, "loss")
    assert sorted((m.step, m.value, m.timestamp) for m in history) == [
        (1, 1 / 3, 1000),
        (2, 2 / 3, 2000),
        (3, 1.5, 3000),
    ]


def test_server_and_training_killed_and_back(
    server: Server, train: Callable[..., Training]
) -> None:
    training = train(f"killed-{server.port}")
    training.start(MLFLOW_TRACKING_URI=server.uri)
    training.wait_for(15)
    server.kill()
    training.wait_for(50)
    training.kill()
    training.start(MLFLOW_TRACKING_URI=server.uri)
    training.wait_for(70)
    server.start()
    said = training.finish()
    if "still to upload" in said:
        done = _upload(training.output)
        assert done.returncode == 0, done.stderr
    _check_whole(MlflowClient(tracking_uri=server.uri), training, restarts=1)


def test_server_that_never_comes_back_until_the_upload(
    server: Server, train: Callable[..., Training]
) -> None:
    training = train(f"away-{server.port}")
    server.kill()
    try:
        training.start(MLFLOW_TRACKING_URI=server.uri)
        said = training.finish()
        command = f"ttt-megatron upload {training.output}"
        assert f"of steps 1 to {_STEPS} still to upload: {command}" in said
        assert said.count("Training goes on") == 1
        assert _upload(training.output, MLFLOW_TRACKING_URI=server.uri).returncode == 1
    finally:
        server.start()
    for _ in range(2):
        done = _upload(training.output, MLFLOW_TRACKING_URI=server.uri)
        assert done.returncode == 0, done.stderr
    run = _check_whole(MlflowClient(tracking_uri=server.uri), training, restarts=0)
    assert run.data.tags["recipe"] == str(training.recipe)


def test_an_exported_model_is_registered_there(
    server: Server, train: Callable[..., Training], tmp_path: Path
) -> None:
    training = train(f"registered-{server.port}")
    training.start(MLFLOW_TRACKING_URI=server.uri)
    training.finish()
    _upload(training.output)
    export = [*_PROGRAM, "export", str(training.output), str(tmp_path / "out"), "--register", "sea"]
    done = subprocess.run(export, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=server.uri)
    (version,) = client.search_model_versions("name = 'sea'")
    assert version.tags["tokens"] == str(_STEPS * 4 * 32)
    fetched = client.download_artifacts(
        version.run_id, version.source.rpartition("/artifacts/")[2], str(tmp_path)
    )
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (Path(fetched) / "model.safetensors").read_bytes() == weights


def test_who_logs_in_is_told_by_mlflows_variables_and_nowhere_written(
    train: Callable[..., Training], tmp_path: Path
) -> None:
    pytest.importorskip("flask_wtf", reason="MLflow's log-in needs it: pip install 'mlflow[auth]'")
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server", auth=True)
    server.start()
    try:
        training = train("secret")
        wrong = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": "a-wrong-password"}
        right = {**wrong, "MLFLOW_TRACKING_PASSWORD": ADMIN_PASSWORD}
        within = server.uri.replace("://", f"://{ADMIN}:{ADMIN_PASSWORD}@")
        training.start(MLFLOW_TRACKING_URI=server.uri, **wrong)
        assert "still to upload" in training.finish()
        assert _upload(training.output, MLFLOW_TRACKING_URI=server.uri).returncode == 1
        done = _upload(training.output, MLFLOW_TRACKING_URI=server.uri, **right)
        assert done.returncode == 0, done.stderr
        # And with all of it in the address.
        other = train("within")
        other.start(MLFLOW_TRACKING_URI=within)
        other.finish()
        again = _upload(other.output, MLFLOW_TRACKING_URI=within)
        assert again.returncode == 0, again.stderr
        assert json.loads((other.output / "mlflow.json").read_text())["uri"] == server.uri
        os.environ.update(right)
        try:
            client = MlflowClient(tracking_uri=server.uri)
            runs = [_check_whole(client, one, restarts=0) for one in (training, other)]
            shown = [str(run.to_dictionary()) for run in runs]
            for run in runs:
                client.download_artifacts(run.info.run_id, "", str(tmp_path / "secret"))
        finally:
            for name in right:
                del os.environ[name]
        shown += [done.stdout, done.stderr, again.stdout, again.stderr]
        folders = (training.output, other.output)
        files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        files += [training.log, other.log]
        assert len(files) > 20
        for secret in (ADMIN_PASSWORD, "a-wrong-password"):
            assert not any(secret.encode() in file.read_bytes() for file in files)
            assert not any(secret in text for text in shown)
    finally:
        server.kill()
