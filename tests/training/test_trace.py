"""A run's trace names the parts of every step."""

from pathlib import Path

import plot_trace
from small_run import small_run

from ttt_megatron.training.run import run_training


def test_a_run_writes_where_its_time_went(data: Path, tmp_path: Path) -> None:
    run_training(small_run(data, tmp_path / "run", training__trace=True, training__steps=2))
    [(rank, spans)] = plot_trace.read_traces(tmp_path / "run" / "trace").items()
    assert rank == 0
    count = {name: [n for n, _, _ in spans].count(name) for name, _, _ in spans}
    # two steps of four micro-batches
    passes = ("prefix forward", "suffix forward", "suffix backward", "prefix backward")
    assert count == dict.fromkeys(passes, 8) | {"optimizer": 2}
    assert all(length > 0 for _, _, length in spans)
