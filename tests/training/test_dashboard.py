"""A run's dashboard: one page that needs nothing else, with marks, from the run's folder alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ttt_megatron.cli.main import main
from ttt_megatron.config import from_dict
from ttt_megatron.training.dashboard.figure import draw_dashboard, thinned
from ttt_megatron.training.dashboard.history import read_history
from ttt_megatron.training.dashboard.page import write_dashboard


def _run(folder: Path, steps: int) -> None:
    """What a run of two attempts leaves, as far as the dashboard reads it."""
    rows = []
    for step in range(1, steps + 1):
        skipped = step == 7
        row = {
            "step": step,
            "loss": None if skipped else 5 / step,
            "grad_norm": 1 / step,
            "learning_rate": 1e-3,
            "inner_learning_rate": 0.1,
            "tokens_per_second": 1000.0,
            "model_flops_per_second": 989e12 / 4,
            "memory_bytes": 2.0**30,
            "skipped": float(skipped),
            "seconds": 0.5,
        }
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    records = [
        {"kind": "event", "event": "started", "step": 0, "time": 1},
        {"kind": "event", "event": "saved", "step": 5, "time": 2},
        {"kind": "event", "event": "resumed", "step": 5, "time": 3},
        {
            "kind": "tags",
            "values": {"gpu": "NVIDIA H100 80GB HBM3", "host": "<node>", "restarts": "1"},
        },
    ]
    (folder / "tracking.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def _config():
    training = {"precision": "bf16", "steps": 10}
    return from_dict({"name": "a <run>", "training": training})


def test_the_figure_has_curves_marks_and_mfu(tmp_path: Path) -> None:
    _run(tmp_path, 10)
    history = read_history(tmp_path, _config())
    assert (history.restarts, history.saves, history.step) == ((5,), (5,), 10)
    assert history.seconds == pytest.approx(5)
    figure = draw_dashboard(history)
    panels = {axes.get_title(): axes for axes in figure.axes}
    mfu = panels["MFU, % (of all GPUs' peak)"].lines[0].get_ydata()
    np.testing.assert_allclose(mfu, 25)
    loss = panels["Loss, nats a token"]
    labels = loss.get_legend_handles_labels()[1]
    assert {"training", "restart", "checkpoint", "skipped step"} <= set(labels)
    drawn = loss.lines[labels.index("training")].get_xydata()
    np.testing.assert_allclose(drawn[:, 1], [5 / step for step in drawn[:, 0]])
    assert 7 not in drawn[:, 0]
    assert [text.get_text() for text in panels["Loss by position, nats a token"].texts] == [
        "not evaluated"
    ]


def test_the_page_stands_alone(tmp_path: Path) -> None:
    _run(tmp_path, 10)
    page, picture = write_dashboard(read_history(tmp_path, _config()), tmp_path / "out")
    text = page.read_text()
    # Names of XML vocabularies are no addresses that anything is fetched from.
    named = set(re.findall(r'https?://[^"\s<]+', text))
    assert named <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "a &lt;run&gt;" in text
    assert "a <run>" not in text.replace("<!-- a <run> -->", "")
    assert "&lt;node&gt;" in text
    assert "optimizer.lr" in text
    with Image.open(picture) as image:
        assert image.size[0] > 1500


def test_long_runs_are_thinned_without_losing_spikes() -> None:
    values = np.ones(100_000)
    values[54_321] = 50
    x, mean, low, high = thinned(range(100_000), list(values))
    assert len(x) == len(mean) == len(low) <= 1000
    assert high.max() == 50
    assert mean.mean() == pytest.approx(values.mean())


def test_the_command_draws_a_run_without_journal(trained_run, tmp_path, capsys) -> None:
    folder = trained_run.control
    assert not (folder / "tracking.jsonl").exists()
    assert main(["dashboard", str(folder), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "dashboard.html"),
        str(tmp_path / "dashboard.png"),
    ]
    assert main(["dashboard", str(folder), "--log"]) == 2
    assert "has no MLflow run" in capsys.readouterr().err
    assert main(["dashboard", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
