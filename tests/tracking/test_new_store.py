"""A store that several runs open for the first time."""

import subprocess
import sys
from pathlib import Path

import pytest

OPEN = (
    "import sys\n"
    "from ttt_megatron.tracking.store import experiment_id, open_client\n"
    "client = open_client(sys.argv[1])\n"
    "print(client.create_run(experiment_id(client, sys.argv[1], 'one')).info.run_id)\n"
)


@pytest.mark.slow
def test_runs_that_begin_at_once_share_a_new_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, uri],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert len({run.strip() for run, _ in told}) == 4
