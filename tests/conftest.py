"""Tests of what this machine or this run cannot do are skipped, and say why."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skip what needs a CUDA device, or Triton's interpreter, where there is none."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "there is no CUDA device"
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        missing["interpreter"] = "TRITON_INTERPRET=1 is not in the environment"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
