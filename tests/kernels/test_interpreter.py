"""The ordinary run's share of the Triton kernels: in the interpreter, in processes of their own.

Triton decides where a kernel is defined whether it is interpreted, so TRITON_INTERPRET has to be
set before anything imports one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_triton_*.py"))
ATTENTION = [f for f in FILES if "swa_attention" in f.name]
GROUPS = {"attention": ATTENTION, "others": [f for f in FILES if f not in ATTENTION]}
# Of the engine's memory policies, the one that has most of the kernels' variants stands for all.
QUICK = "interpreter and not slow", "not recompute and not save_activations"


@pytest.mark.parametrize("group", GROUPS)
def test_quick_cases_pass_in_the_interpreter(group):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", QUICK[0], "-k", QUICK[1], *GROUPS[group]],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    outcomes = re.findall(r"\d+ (\w+)", done.stdout.splitlines()[-1])
    assert "passed" in outcomes, done.stdout[-2000:]
    assert "skipped" not in outcomes, done.stdout[-2000:]
