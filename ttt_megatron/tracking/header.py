"""Who a run is, whatever store it is or will be in."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.tracking.journal import HEADER, Record, read_records

# As JSON has it: a run's key and name.
Stage = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Header:
    """The journal's first record.

    `lineage` are the stages that led to the run's weights, (key, name) each, the first one first
    and the run itself last; the key is the run's own id, made before any store is asked.
    `parent_run` is an MLflow run's id. `time` in ms.
    """

    name: str
    experiment: str
    lineage: tuple[tuple[str, str], ...]
    parent_run: str | None
    time: int

    @property
    def key(self) -> str:
        """The run's own."""
        return self.lineage[-1][0]


def new_header(config: RunConfig, base: Sequence[Stage] = ()) -> Header:
    """For a run that begins now; `base` is the lineage of the run that it starts from."""
    own = (uuid.uuid4().hex, config.name)
    return Header(
        name=config.name,
        experiment=config.tracking.experiment,
        lineage=(*((stage[0], stage[1]) for stage in base), own),
        parent_run=config.tracking.parent_run,
        time=int(time.time() * 1000),
    )


def to_record(header: Header) -> Record:
    """As the journal has it."""
    return {"kind": HEADER, **asdict(header)}


def read_header(journal: Path) -> Header | None:
    """The journal's first record; None if there is none yet."""
    records, _ = read_records(journal, 0, limit=1)
    if not records or records[0]["kind"] != HEADER:
        return None
    values: dict[str, Any] = {k: v for k, v in records[0].items() if k != "kind"}
    values["lineage"] = tuple((stage[0], stage[1]) for stage in values["lineage"])
    return Header(**values)
