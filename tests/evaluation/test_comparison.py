"""Evaluations side by side: whose differences, over which documents, and what is concluded."""

import numpy as np
import pytest

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.comparison import compare, find_report
from ttt_megatron.evaluation.report import PositionReport, write_files
from ttt_megatron.evaluation.statistics import Bucket, BucketSums

BUCKETS = [Bucket(0, 8), Bucket(8, 16), Bucket(16, 32)]
COUNTS = np.array([[8, 8, 16], [8, 8, 10], [8, 8, 0]])


def report(means, **about):
    """Curves whose documents have the losses `mean` + 0.1 · number in every range."""
    scatter = 0.1 * np.arange(3)[:, None]
    curves = {
        name: BucketSums((np.asarray(mean) + (number + 1) * scatter) * COUNTS, COUNTS)
        for number, (name, mean) in enumerate(means.items())
    }
    about = {"window_size": 8, "data_fingerprint": "x", **about}
    return PositionReport(
        buckets=BUCKETS, curves=curves, documents=["a", "b", "c"], about=dict(about)
    )


@pytest.fixture
def comparison():
    after = report({"on": [3.0, 2.5, 2.0], "off": [3.0, 3.5, 3.0]})
    before = report({"on": [2.5, 2.75, 2.5]})
    return compare({"after": after, "before": before})


def test_differences_are_to_the_first_curve_of_all_and_paired(comparison):
    assert comparison.reference == "on, after"
    assert list(comparison.report.curves) == ["on, after", "off, after", "on, before"]
    cells = {row[0]: row[1:] for row in comparison._rows(list(comparison.report.curves))}
    # The documents' differences off − on are 0, 0.1 and 0.2: 0.1 ± 0.1/√3 in the first range.
    assert cells["0-8"] == ["3.10", "3.20 (+0.10 ± 0.06)", "2.60 (-0.50 ± 0.00)", "3"]
    # Only two documents reach the last range, the longer one counts more: 0.1 · 10/26 = 0.038.
    assert cells["16-32"][1].startswith("3.08 (+1.04 ± ")
    assert cells["16-32"][3] == "2"


def test_findings_count_the_ranges_beyond_the_window_only(comparison):
    off, before = comparison.findings()
    assert off.startswith("on, after is below off, after in 2 of 2 ranges beyond the window of 8")
    assert "most at 8-16, by 1.10 ± 0.06 nats" in off
    assert "below on, before in 2 of 2 ranges" in before


def test_a_range_where_the_reference_is_above_is_not_counted():
    mixed = report({"on": [1.0, 1.0, 3.0], "off": [1.0, 2.0, 2.0]})
    assert "in 1 of 2 ranges" in compare({"x": mixed}).findings()[0]


def test_markdown_holds_all_curves_and_the_findings(comparison):
    lines = comparison.markdown().splitlines()
    assert "| position | on, after | off, after | on, before | documents |" in lines
    assert sum(line.startswith("| ") for line in lines) == 2 + len(BUCKETS) + 1
    assert lines[-1].startswith("* on, after is below on, before")


def test_a_colour_stands_for_the_way_of_reading_and_a_line_for_the_evaluation(comparison):
    styles = comparison.styles()
    assert styles["on, after"]["color"] == styles["on, before"]["color"]
    assert styles["on, after"]["color"] != styles["off, after"]["color"]
    assert styles["on, after"]["linestyle"] == styles["off, after"]["linestyle"]
    assert styles["on, after"]["linestyle"] != styles["on, before"]["linestyle"]


def test_tables_are_one_an_evaluation(comparison):
    titles = [table.title for table in comparison.tables()]
    assert titles == ["after", "before"]
    assert [table.row_count for table in comparison.tables()] == [4, 4]


def test_other_data_and_other_documents_are_refused():
    one = report({"on": [1.0, 1.0, 1.0]})
    with pytest.raises(UserError, match="'two' read other data"):
        compare({"one": one, "two": report({"on": [1.0] * 3}, data_fingerprint="y")})
    other = PositionReport(
        buckets=BUCKETS, curves=one.curves, documents=["a", "b", "d"], about=one.about
    )
    with pytest.raises(UserError, match="different documents"):
        compare({"one": one, "two": other})
    with pytest.raises(UserError, match="nothing to compare"):
        compare({})


def test_reports_are_found_in_files_and_folders(tmp_path):
    folder = tmp_path / "run" / "evaluation"
    file, _ = write_files(report({"on": [1.0, 2.0, 3.0]}), folder, "by_position")
    for path in (file, folder, tmp_path / "run"):
        assert list(find_report(path).curves) == ["on"]
    with pytest.raises(UserError, match="evaluate"):
        find_report(tmp_path)


def test_the_joined_report_reads_back(comparison, tmp_path):
    file, _ = write_files(comparison.report, tmp_path, "by_position")
    again = find_report(file)
    assert again.to_json() == comparison.report.to_json()
    assert set(again.about["compared"]) == {"after", "before"}


def test_findings_leave_out_other_ways_of_reading_in_other_evaluations():
    means = {"on": [1.0] * 3, "off": [2.0] * 3}
    findings = compare({"after": report(means), "before": report(means)}).findings()
    assert [text.split(" in ")[0] for text in findings] == [
        "on, after is below off, after",
        "on, after is below on, before",
    ]
