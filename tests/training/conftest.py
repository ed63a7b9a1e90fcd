"""A prepared folder for training, and runs small enough for tests."""

from pathlib import Path

import pytest
from small_run import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random text at byte level, with a validation split. Read only."""
    return make_data(tmp_path_factory.mktemp("training-data"))
