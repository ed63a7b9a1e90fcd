"""Stores and journals for tests of the tracking."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ttt_megatron.config import from_dict
from ttt_megatron.tracking.header import new_header, to_record
from ttt_megatron.tracking.journal import JOURNAL_FILE, Journal, Record
from ttt_megatron.tracking.store import open_client
from ttt_megatron.tracking.uploader import Uploader

_numbers = itertools.count()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """A store in SQLite; tests have experiments of their own there."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    shutil.copy(empty_store, path)
    return f"sqlite:///{path}"


@dataclass
class Kept:
    """A run's folder with a journal, and the store it goes to."""

    folder: Path
    uri: str
    experiment: str
    lineage: tuple[tuple[str, str], ...]

    @property
    def uploader(self) -> Uploader:
        """A new one, as of a new process."""
        return Uploader(self.folder, self.uri)

    def append(self, *records: Record) -> None:
        """Into the journal."""
        Journal(self.folder / JOURNAL_FILE).append(records)

    def upload(self) -> str:
        """Everything; the MLflow run's id."""
        uploader = self.uploader
        while uploader.upload_piece():
            pass
        uploader.upload_deferred()
        uploader.close()
        assert uploader.run_id is not None
        return uploader.run_id

    @property
    def client(self) -> Any:
        """Of the store."""
        return open_client(self.uri)

    def runs(self) -> list[Any]:
        """All in the experiment."""
        found = self.client.get_experiment_by_name(self.experiment)
        return list(self.client.search_runs([found.experiment_id]))


MakeRun = Callable[..., Kept]


@pytest.fixture
def make_run(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Makes runs' folders with journals that have but their header, in one experiment a test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = f"experiment-{next(_numbers)}"

    def make(name: str, *, base: Kept | None = None, parent: str | None = None) -> Kept:
        tracking = {"experiment": experiment, "parent_run": parent}
        config = from_dict({"name": name, "tracking": tracking})
        header = new_header(config, () if base is None else base.lineage)
        folder = tmp_path / name
        folder.mkdir()
        made = Kept(folder, store, experiment, header.lineage)
        made.append(to_record(header))
        return made

    return make
