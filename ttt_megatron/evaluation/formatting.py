"""How means are written: in a table's cell, and in JSON."""

import math
from typing import Any

from ttt_megatron.evaluation.statistics import Mean


def mean_cell(mean: Mean, sign: str = "", digits: int = 3) -> str:
    """`1.234 ± 0.056`, `-` where nothing was measured; sign "+" writes it always."""
    if not mean.documents:
        return "-"
    text = f"{mean.mean:{sign}.{digits}f}"
    if math.isnan(mean.standard_error):
        return text
    return f"{text} ± {mean.standard_error:.{digits}f}"


def mean_values(mean: Mean | None) -> dict[str, Any] | None:
    """Plain values, None where there is no number, as JSON has no nan."""
    if mean is None:
        return None
    return {
        "mean": mean.mean if math.isfinite(mean.mean) else None,
        "standard_error": mean.standard_error if math.isfinite(mean.standard_error) else None,
        "documents": mean.documents,
        "tokens": mean.tokens,
    }


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, all columns but the first aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
