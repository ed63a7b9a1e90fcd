"""An exported model as a registered version of its run's."""

import pytest
from mlflow.tracking import MlflowClient

from ttt_megatron.cli.main import main
from ttt_megatron.tracking.state import read_tracking


def test_a_version_with_its_run_and_tags(trained_run, exported_run, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    run = str(trained_run.output)
    command = ["export", run, str(exported_run), "--register", "sea"]
    assert main(command) == 0
    assert "registered  sea version 1" in capsys.readouterr().out
    # The same again makes no other version, as after an answer that was lost.
    assert main(command) == 0
    tracked = read_tracking(trained_run.output)
    client = MlflowClient(tracking_uri=tracked["uri"])
    (version,) = client.search_model_versions("name = 'sea'")
    assert version.run_id == tracked["run_id"]
    card = (exported_run / "README.md").read_text()
    assert f"`{version.tags['hash']}`" in card
    assert f"of {int(version.tags['parameters']):,} parameters" in card
    assert {k: version.tags[k] for k in ("step", "tokens", "run", "inner_mode")} == {
        "step": "4",
        "tokens": str(4 * 2 * 64),
        "run": "run",
        "inner_mode": "meta",
    }
    place = version.source.rpartition("/artifacts/")[2]
    stored = {file.path.rpartition("/")[2] for file in client.list_artifacts(version.run_id, place)}
    assert stored == {path.name for path in exported_run.iterdir()}
    assert client.get_run(version.run_id).data.tags["registered.sea"] == "1"


@pytest.mark.parametrize(
    ("run", "name", "registry", "told"),
    [
        ("output", "sea", "ftp://nowhere", "has no registry of models"),
        ("output", "sea", "http://127.0.0.1:9", "does not do it"),
        ("output", "a/b", None, "holds no /"),
        ("control", "sea", None, "ttt-megatron upload"),
    ],
)
def test_what_cannot_be_registered_is_said_before_the_export(
    trained_run, tmp_path, capsys, monkeypatch, run, name, registry, told
):
    if registry is not None:
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    folder = getattr(trained_run, run)
    assert main(["export", str(folder), str(tmp_path / "out"), "--register", name]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
