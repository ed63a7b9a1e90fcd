"""Status from what a real Slurm 22.05 printed, and from runs' folders."""

from pathlib import Path

from ttt_megatron.cluster.records import JobRecord
from ttt_megatron.cluster.slurm import parse_sacct, parse_squeue

RECORDED = Path(__file__).parent / "recorded"
QUEUE = parse_squeue((RECORDED / "squeue.txt").read_text())
ACCOUNTS = parse_sacct((RECORDED / "sacct.txt").read_text())


def _record(job_id: str, output: Path, **changes) -> JobRecord:
    values = {
        "job_id": job_id,
        "name": output.name,
        "recipe": "r.yaml",
        "overrides": ["parallel.data=2"],
        "output": str(output),
        "script": str(output / "slurm" / "a.sbatch"),
        "folder": str(output / "slurm"),
        "time": "2026-11-28T05:00:00+0000",
        "nodes": 2,
        "processes": 1,
        "profile": "cpu",
        "commit": "0" * 40,
        "user": "root",
        "after": [],
        "steps": 60,
    }
    return JobRecord(**{**values, **changes})
