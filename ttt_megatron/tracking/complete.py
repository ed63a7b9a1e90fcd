"""A journal completed from the metrics log, which is written before a step is over."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ttt_megatron.tracking.journal import Record, metrics_record

# What a row of the metrics log has besides figures.
_NO_FIGURES = frozenset({"step", "time", "seconds"})


def rows_as_records(rows: Iterable[Mapping[str, Any]], time_ms: int) -> list[Record]:
    """A record of every row, those without a time at `time_ms`; a journal takes what it lacks."""
    return [
        metrics_record(
            {
                name: float(value)
                for name, value in row.items()
                if name not in _NO_FIGURES and _is_finite(value)
            },
            int(row["step"]),
            int(row["time"] * 1000) if _is_finite(row.get("time")) else time_ms,
        )
        for row in rows
    ]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
