"""What a run's folder knows of its MLflow run: the store, the id, how much has been uploaded."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ttt_megatron.tracking.journal import Record

TRACKING_FILE = "mlflow.json"


@dataclass(frozen=True, kw_only=True)
class TrackingState:
    """`uri` as `tracking_uri` gives it; `sent` bytes of the journal are in the store, None if the
    run was logged without a journal; `deferred` are artifacts that could not be uploaded."""

    uri: str
    run_id: str
    sent: int | None = None
    deferred: tuple[Record, ...] = ()


def read_state(output: Path) -> TrackingState | None:
    """The state in an output folder; None if it was never tracked."""
    try:
        values = json.loads((output / TRACKING_FILE).read_text())
        sent = values.get("sent")
        return TrackingState(
            uri=str(values["uri"]),
            run_id=str(values["run_id"]),
            sent=None if sent is None else int(sent),
            deferred=tuple(values.get("deferred", ())),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_state(output: Path, state: TrackingState) -> None:
    """Writes what `read_state` reads."""
    beside = output / f"{TRACKING_FILE}.{os.getpid()}.tmp"
    beside.write_text(json.dumps(asdict(state)))
    beside.replace(output / TRACKING_FILE)


def read_tracking(output: Path) -> dict[str, str]:
    """`uri` and `run_id` of the run in an output folder; empty if it was never tracked."""
    state = read_state(output)
    return {} if state is None else {"uri": state.uri, "run_id": state.run_id}


def write_tracking(output: Path, uri: str, run_id: str) -> None:
    """Writes what `read_tracking` reads, for a run that has no journal."""
    write_state(output, TrackingState(uri=uri, run_id=run_id))
