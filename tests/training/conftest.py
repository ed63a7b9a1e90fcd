"""A prepared folder for training, and packages to be found in place of others."""

import sys
import textwrap
from pathlib import Path

import pytest
from small_run import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random text at byte level, with a validation split. Read only."""
    return make_data(tmp_path_factory.mktemp("training-data"))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes packages into a folder from which they are imported, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("apex", "transformer_engine", "fused_layer_norm_cuda"):
            del sys.modules[name]
