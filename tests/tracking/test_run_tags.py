"""Tags that say where a run comes from, and addresses that say nothing secret."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from ttt_megatron.config import from_dict
from ttt_megatron.config.addresses import without_secrets
from ttt_megatron.errors import UserError
from ttt_megatron.tracking.run_tags import RECIPE_VARIABLE, run_tags
from ttt_megatron.tracking.store import _with_secrets, in_words, open_client, tracking_uri


def test_slurm_recipe_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\n")
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_JOB_NODELIST": "node[01-04]",
    }
    for name, value in {**slurm, RECIPE_VARIABLE: str(recipe)}.items():
        monkeypatch.setenv(name, value)
    tags = run_tags(from_dict({"training": {"init_from": "runs/before"}}))
    told = {key: value for key, value in tags.items() if key.startswith("slurm.")}
    assert told == {
        "slurm.job_id": "77",
        "slurm.array_job_id": "70",
        "slurm.array_task_id": "7",
        "slurm.restart_count": "2",
        "slurm.nodes": "node[01-04]",
    }
    assert tags["recipe"] == str(recipe)
    assert tags["recipe.sha256"] == hashlib.sha256(b"name: x\n").hexdigest()
    assert tags["init_from"] == "runs/before"
    assert {"host", "version", "torch", "settings.sha256"} <= tags.keys()
    here = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    assert tags.get("git.commit", "") == here


def test_an_environment_within_another_checkout_has_no_commit(tmp_path: Path) -> None:
    from ttt_megatron.tracking.run_tags import _commit

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "__init__.py").touch()
    assert _commit(tmp_path / "site") == {}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:s3cret@host:5000/a", "https://host:5000/a"),
        ("postgresql://me:p@ss@db/mlflow", "postgresql://db/mlflow"),
        (
            "postgresql://db/mlflow?user=a&password=b&x=1",
            "postgresql://db/mlflow?user=a&password=***&x=1",
        ),
        (
            "failed: https://tok@host/x for https://host/@y",
            "failed: https://host/x for https://host/@y",
        ),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_addresses_are_shown_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_recipes_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tracking\.tracking_uri holds a user") as refused:
        from_dict({"tracking": {"tracking_uri": "https://me:s3cret@host"}})
    assert "s3cret" not in str(refused.value)


def test_one_in_the_environment_is_used_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://me:s3cret@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    uri = tracking_uri(from_dict({}).tracking, tmp_path)
    assert uri == "http://127.0.0.1:9"
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # MLflow prints the address that it is given.
    assert open_client(uri).tracking_uri == uri
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s3cret"
    assert open_client("http://127.0.0.1:10").tracking_uri == "http://127.0.0.1:10"
    told = in_words(ValueError(f"no answer from {address}/x with t0ken\nand more"))
    assert told == "ValueError: no answer from http://127.0.0.1:9/x with ***"
    database = "postgresql://me:s3cret@127.0.0.1:9/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert tracking_uri(from_dict({}).tracking, tmp_path) == "postgresql://127.0.0.1:9/mlflow"
    assert _with_secrets("postgresql://127.0.0.1:9/mlflow") == database
