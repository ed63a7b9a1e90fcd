"""Exported models and a served one, shared by the tests that only read them."""

from pathlib import Path

import pytest
from tiny_export import tiny_config, write_export

from ttt_megatron.service.served_model import ServedModel, load_served_model


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported model."""
    return write_export(tmp_path_factory.mktemp("exported") / "tiny")


@pytest.fixture(scope="session")
def other_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return write_export(tmp_path_factory.mktemp("exported") / "other", seed=1)


@pytest.fixture(scope="session")
def served(export: Path) -> ServedModel:
    """The exported model, loaded in float32 on the CPU."""
    return load_served_model(export, device="cpu")


@pytest.fixture(scope="session", params=["float64", "full attention", "bfloat16", "plain"])
def any_served(request: pytest.FixtureRequest, tmp_path_factory, export: Path) -> ServedModel:
    """Models of several kinds."""
    if request.param == "full attention":
        folder = tmp_path_factory.mktemp("exported") / "full"
        return load_served_model(write_export(folder, tiny_config(window=None)), device="cpu")
    dtype = request.param if "float" in request.param else "auto"
    steps = request.param != "plain"
    return load_served_model(export, device="cpu", dtype=dtype, inner_steps=steps)
