"""What a benchmark found, as it is written to JSON and read again."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ttt_megatron.errors import UserError

FORMAT = 1
MEASURED = "measured"


@dataclass(kw_only=True)
class Result:
    """One case. Times in seconds, one a run; `status` is MEASURED or says what is in the way.

    seconds: on a GPU by CUDA events, on a CPU those of its one thread; wall_seconds: by the clock
    on the wall, on a CPU; clock: how they were taken; flops and bytes: the least it takes; floor:
    the seconds these need at the ceilings; model_flops: what MFU counts; peak_bytes: the most
    that was allocated, its weights included; ratio: median over its group's reference.
    """

    section: str
    operation: str
    shape: str
    precision: str
    name: str
    way: str
    status: str
    reason: str = ""
    settings: str = ""
    clock: str = ""
    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    flops: float | None = None
    bytes: float | None = None
    floor: float | None = None
    model_flops: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    tokens: int | None = None
    ratio: float | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same case in another run."""
        place = self.section, self.operation, self.shape, self.precision
        return *place, self.name, self.way, self.settings

    @property
    def median(self) -> float | None:
        """Seconds; None if it was not measured."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles over the median; None with fewer than 3 runs."""
        if len(self.seconds) < 3:
            return None
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / middle if middle else None

    @property
    def share_of_floor(self) -> float | None:
        """Floor over median: 1 is as fast as the machine allows."""
        return self.floor / self.median if self.floor and self.median else None


@dataclass(kw_only=True)
class Report:
    """A whole run: where and how it was measured, and every case."""

    about: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def to_json(self) -> str:
        """Everything, raw, with the medians worked out."""
        rows = [{**asdict(one), "median": one.median, "spread": one.spread} for one in self.results]
        return json.dumps({"format": FORMAT, "about": self.about, "results": rows}, indent=1) + "\n"

    @property
    def sections(self) -> list[str]:
        """Those that have results, in their order."""
        return list(dict.fromkeys(one.section for one in self.results))


def read_report(path: Path) -> Report:
    """A report written before; raises UserError if the file is none."""
    known = set(Result.__dataclass_fields__)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise UserError(f"{path}: its format is {data['format']}, not {FORMAT}: measure again")
        rows = [{k: v for k, v in row.items() if k in known} for row in data["results"]]
        return Report(about=dict(data["about"]), results=[Result(**row) for row in rows])
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a bench.json that "
            "`ttt-megatron bench --output` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is no result of `ttt-megatron bench`: give a bench.json that --output wrote"
        ) from None


def write_beside(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
