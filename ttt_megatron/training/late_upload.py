"""Uploading a run's journal when the run is over, or was never to log by itself."""

from pathlib import Path

from ttt_megatron.config.addresses import without_secrets
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.tracking import journal
from ttt_megatron.tracking.complete import rows_as_records
from ttt_megatron.tracking.header import new_header, read_header, to_record
from ttt_megatron.tracking.journal import JOURNAL_FILE, Journal
from ttt_megatron.tracking.recorder import now_ms
from ttt_megatron.tracking.state import read_state
from ttt_megatron.tracking.store import in_words, tracking_uri
from ttt_megatron.tracking.uploader import Uploader
from ttt_megatron.training.callbacks.tracking import settings_records
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, read_config, read_info
from ttt_megatron.training.lineage import lineage_of_start
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics
from ttt_megatron.training.preflight import find_resumable


def is_run(folder: Path) -> bool:
    """Whether there is something of a run in a folder."""
    return any((folder / name).exists() for name in (JOURNAL_FILE, METRICS_FILE, CHECKPOINTS))


def chosen_store(folder: Path, to: str | None) -> str:
    """The store that was asked for, that the run logs to, or that it would; as `tracking_uri`.

    Raises UserError if the one asked for holds a password.
    """
    if to is not None:
        if without_secrets(to) != to:
            raise UserError(
                "--to holds a user name, password or token, which others see in the list of "
                "processes: give them by MLflow's variables"
            )
        return to
    state = read_state(folder)
    return tracking_uri(_config(folder).tracking, folder) if state is None else state.uri


def prepare_upload(folder: Path, uri: str, *, write: bool = True) -> Uploader | None:
    """An uploader of a run whose journal is complete; without `write`, None if it has no journal.

    Raises UserError if the folder cannot be read or written to, or holds no run.
    """
    path = folder / JOURNAL_FILE
    if not write:
        return Uploader(folder, uri) if read_header(path) is not None else None
    try:
        records = []
        header, state = read_header(path), read_state(folder)
        if header is None:
            config = _config(folder)
            header = new_header(config, lineage_of_start(config))
            records += [to_record(header), *settings_records(config)]
        if state is None or state.sent is not None:
            written = now_ms()
            records += rows_as_records(read_metrics(folder / METRICS_FILE), written)
        if read_header(path) is None:
            records.append(_end(folder))
        Journal(path).append(records)
    except (OSError, TypeError, KeyError) as error:
        raise UserError(f"{path}: {error}; see that the folder can be written to") from None
    return Uploader(folder, uri)


def upload_run(uploader: Uploader) -> str | None:
    """Uploads everything; what went wrong in words, None if nothing did. Raises UserError if
    another process uploads the run."""
    try:
        while uploader.upload_piece():
            pass
        uploader.upload_deferred()
    except UserError:
        raise
    except Exception as error:  # whatever MLflow, its store or the network raises
        return f"MLflow at {uploader.uri}: {in_words(error)}"
    finally:
        uploader.close()
    left = uploader.left()
    return None if not left.records else f"MLflow at {uploader.uri} did not take everything"


def _config(folder: Path) -> RunConfig:
    checkpoint = find_resumable(folder, quick=True)
    if checkpoint is None:
        raise UserError(f"{folder} holds no checkpoint that tells the run's settings")
    return read_config(checkpoint)


def _end(folder: Path) -> journal.Record:
    """How an untracked run ended, as far as its newest checkpoint tells."""
    checkpoint = find_resumable(folder, quick=True)
    assert checkpoint is not None
    finished = read_info(checkpoint).step >= read_config(checkpoint).training.steps
    status = "FINISHED" if finished else "KILLED"
    changed = int(checkpoint.stat().st_mtime * 1000)
    return {"kind": journal.STATUS, "status": status, "time": changed}
