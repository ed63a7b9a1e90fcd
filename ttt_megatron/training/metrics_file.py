"""The file of a run's figures, one JSON object a step. Knows no torch."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
_TAIL_BYTES = 1 << 14


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first; a last line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def cut_metrics(path: Path, step: int) -> None:
    """Ends the file before its first row of a later step, or that cannot be read.

    Takes no room on the disk. Raises OSError if the file cannot be read or cut.
    """
    if not path.exists():
        return
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            if not (line.endswith(b"\n") and _is_row_up_to(step, line)):
                break
            kept += len(line)
        file.truncate(kept)


def _is_row_up_to(step: int, line: bytes) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError):
        return False


def last_row(path: Path, key: str = "step") -> dict[str, Any] | None:
    """The newest row that has a figure of this name, looked for in the file's end alone; cheap."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and key in row:
            return row
    return None
