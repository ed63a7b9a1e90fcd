"""Finding NVIDIA Apex and TransformerEngine, which a user's build may have and nobody must."""

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class NotAvailableError(Exception):
    """Why an implementation is not to be had, in one clause."""


def require_apex(file: str) -> None:
    """Raises NotAvailableError unless NVIDIA's Apex, with this file, is installed.

    PyPI's package of the same name, a web toolkit, is not imported.
    """
    spec = find_spec("apex")
    if spec is None:
        raise NotAvailableError("no package apex is installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / file).is_file() for folder in folders):
        raise NotAvailableError(
            f"the package apex in {folders[0] if folders else spec.origin} is not NVIDIA's (PyPI's "
            "is a web toolkit; NVIDIA's is built from github.com/NVIDIA/apex)"
        )


def require_transformer_engine() -> None:
    """Raises NotAvailableError unless a package of that name is installed."""
    if find_spec("transformer_engine") is None:
        raise NotAvailableError("no package transformer_engine is installed")


def imported(module: str) -> Any:
    """The module; raises NotAvailableError with what kept it from being imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        # A TransformerEngine without its compiled core raises RuntimeError, others OSError.
        raise NotAvailableError(
            f"{module} cannot be imported ({type(error).__name__}: {error})"
        ) from None
