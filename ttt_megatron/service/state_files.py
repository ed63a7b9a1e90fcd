"""Files of adapted states as sessions: whether they fit the served model, and what they hold."""

import logging
from collections.abc import Callable
from pathlib import Path

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.hf.state_ttt_e2e import StateError, read_state_info
from ttt_megatron.service.errors import RequestError
from ttt_megatron.service.served_model import ServedModel
from ttt_megatron.service.session import Session
from ttt_megatron.service.session_store import SessionStore

log = logging.getLogger(__name__)


def load_state_file(served: ServedModel, path: Path) -> TTTE2ECache:
    """The state in a file; RequestError 409 if it is damaged or was not left by this model."""
    try:
        problem = _misfit(served, path)
        if problem is None:
            return TTTE2ECache.load(path, served.model)
    except StateError as error:
        problem = str(error)
    raise RequestError(409, problem)


def found_session(served: ServedModel, store: SessionStore, name: str) -> Session:
    """The session of a file in the store, refused if the file cannot be used."""
    path = store.path(name)
    stat = path.stat()
    session = Session(name=name, file_bytes=stat.st_size, last_used=stat.st_mtime)
    try:
        session.refused = _misfit(served, path)
        info = read_state_info(path)
    except StateError as error:
        session.refused = str(error)
    else:
        session.position, session.steps = info["position"], info["steps"]
        session.drift, session.drift_steps = info["drift"], info["steps"]
    if session.refused:
        log.warning("session %s is refused: %s", name, session.refused)
    return session


def writing(name: str, write: Callable[[str], object]) -> None:
    """Calls write(name); RequestError 507 if the disk does not let it."""
    try:
        write(name)
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(
            507,
            f"the file of session {name!r} cannot be written ({reason}): make room in "
            "--session-dir; the session is as it was",
        ) from None


def _misfit(served: ServedModel, path: Path) -> str | None:
    """Why a file cannot go on here, as far as its metadata tells; StateError if it has none."""
    info = read_state_info(path)
    if info["base"] != served.model.base_hash():
        return (
            f"{path} belongs to another base model ({info['base'][:12]}…): serve the model it "
            "was read with, or DELETE the session"
        )
    if bool(info["fast_weights"]) != served.learns:
        does, did = ("takes", "without") if served.learns else ("takes no", "with")
        return (
            f"{path} was read {did} inner steps and this service {does} inner steps: serve "
            "the model the same way, or DELETE the session"
        )
    return None
