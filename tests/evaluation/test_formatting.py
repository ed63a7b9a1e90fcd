"""Cells of tables, plain values and Markdown."""

import math

from ttt_megatron.evaluation.formatting import markdown_table, mean_cell, mean_values
from ttt_megatron.evaluation.statistics import Mean


def test_cells_say_what_is_known():
    assert mean_cell(Mean(1.25, 0.5, 3, 30)) == "1.250 ± 0.500"
    assert mean_cell(Mean(1.25, 0.5, 3, 30), "+", 1) == "+1.2 ± 0.5"
    assert mean_cell(Mean(1.25, math.nan, 1, 30)) == "1.250"
    assert mean_cell(Mean(math.nan, math.nan, 0, 0)) == "-"


def test_values_hold_no_nan():
    assert mean_values(None) is None
    values = mean_values(Mean(1.25, math.nan, 1, 30))
    assert values == {"mean": 1.25, "standard_error": None, "documents": 1, "tokens": 30}


def test_markdown():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
