"""The report's figures, and that they survive JSON, table and picture."""

import json
import math

import numpy as np
import pytest

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.by_position import PerTokenLosses
from ttt_megatron.evaluation.plot import draw_by_position
from ttt_megatron.evaluation.report import PositionReport, read_report, write_files
from ttt_megatron.evaluation.statistics import position_buckets, sum_buckets

LENGTHS = (100, 100, 60, 100)


def losses(seed):
    generator = np.random.default_rng(seed)
    nll = [generator.gamma(2.0, 1.5, length) for length in LENGTHS]
    return PerTokenLosses(nll, [np.ones(length, dtype=bool) for length in LENGTHS])


@pytest.fixture
def runs():
    return {"on": losses(1), "off": losses(2), "control": losses(3)}


@pytest.fixture
def report(runs):
    buckets = position_buckets(100)
    return PositionReport(
        buckets=buckets,
        curves={name: sum_buckets(each, buckets) for name, each in runs.items()},
        documents=list("abcd"),
        document_bytes=[300, 310, 150, 290],
        about={"window_size": 8},
    )


def test_means_and_differences_equal_a_direct_computation(report, runs):
    on, off = runs["on"].nll, runs["off"].nll
    assert report.mean("on", 2).mean == pytest.approx(np.mean([x[64:] for x in on if len(x) > 64]))
    assert report.mean("on", 2).documents == 3
    assert report.mean("off").mean == pytest.approx(np.concatenate(off).mean())
    paired = np.array([a[:32].mean() - b[:32].mean() for a, b in zip(on, off, strict=True)])
    difference = report.difference("on", "off", 0)
    assert difference.mean == pytest.approx(paired.mean())
    assert difference.standard_error == pytest.approx(paired.std(ddof=1) / 2)
    nats = np.concatenate(on).sum()
    assert report.bits_per_byte("on").mean == pytest.approx(nats / math.log(2) / 1050)


def test_json_says_what_the_methods_say_and_reads_back(report, tmp_path):
    path, _ = write_files(report, tmp_path / "new", "x")
    value = json.loads(path.read_text())
    difference = report.difference("on", "control", 1)
    entry = value["differences"]["on - control"]["buckets"][1]
    assert (entry["mean"], entry["standard_error"]) == (
        difference.mean,
        difference.standard_error,
    )
    assert value["curves"]["on"]["total"]["tokens"] == 360
    again = read_report(path)
    assert again.to_json() == report.to_json()
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.json", "x.md"]
    path.write_text("{}")
    with pytest.raises(UserError, match="no report"):
        read_report(path)


def test_the_table_shows_every_bucket_and_the_totals(report):
    lines = report.markdown().splitlines()
    assert lines[0] == "| position | on | off | control | on - off | on - control | documents |"
    mean = report.mean("on", 0)
    assert lines[2].startswith(f"| 0-32 | {mean.mean:.3f} ± {mean.standard_error:.3f} |")
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| 0-32",
        "| 32-64",
        "| 64-100",
        "| all",
        "| bits a byte",
    ]
    assert report.table().row_count == 5


def test_curves_of_another_report_join_only_over_the_same_documents(report, runs):
    both = report.joined(report, {"on": "on before"})
    assert both.difference("on", "on before").mean == 0.0
    buckets = report.buckets
    shorter = PerTokenLosses([x[:50] for x in runs["on"].nll], [x[:50] for x in runs["on"].counted])
    other = PositionReport(
        buckets=buckets, curves={"on": sum_buckets(shorter, buckets)}, documents=list("abcd")
    )
    with pytest.raises(UserError, match="different documents"):
        report.joined(other, {"on": "other"})


def test_losses_that_are_no_numbers_stay_out_of_json_and_metrics(report):
    report.curves["off"].nll[0, 0] = math.nan
    value = json.loads(report.to_json())
    assert value["curves"]["off"]["total"]["mean"] is None
    assert value["document_nll"]["off"][0][0] is None
    assert "off/total" not in report.metrics()
    assert "on/total" in report.metrics()


@pytest.mark.parametrize("window", [8, None])
def test_the_picture_is_written_whole(report, tmp_path, window):
    path = tmp_path / "x.png"
    draw_by_position(report, path, "title", window)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
