"""Which MLflow store a run logs to, a client for it, and its errors in words, without secrets.

Who logs in is said by MLflow's own variables (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD,
MLFLOW_TRACKING_TOKEN, MLFLOW_TRACKING_INSECURE_TLS, …), which MLflow reads at every request. They
are read here only to keep their values out of messages.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ttt_megatron.config.addresses import without_secrets
from ttt_megatron.config.schema import TrackingConfig

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
_SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SQLITE = "sqlite:///"
# MLflow's own values would have it try for minutes.
_REQUESTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_CHATTY = ("alembic", "mlflow", "mlflow.store.db.utils")


def tracking_uri(tracking: TrackingConfig, output: Path) -> str:
    """The store: the recipe's, else MLFLOW_TRACKING_URI, else SQLite beside the run's folder.

    Without a password that MLFLOW_TRACKING_URI may hold: `open_client` puts it back.
    """
    chosen = tracking.tracking_uri or os.environ.get(STORE_VARIABLE)
    return without_secrets(chosen or f"{_SQLITE}{output.resolve().parent / 'mlflow.db'}")


def _with_secrets(uri: str) -> str:
    """As one can connect to it: MLFLOW_TRACKING_URI if it is the same store's.

    MLflow prints the addresses of servers: name and password in one become MLflow's variables.
    """
    chosen = os.environ.get(STORE_VARIABLE)
    if not chosen or without_secrets(chosen) != uri:
        return uri
    parts = urlsplit(chosen)
    if parts.scheme in ("http", "https") and parts.username and parts.password:
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password))
        return uri
    return chosen


def open_client(uri: str, *, timeout: int = 10) -> Any:
    """An MlflowClient that notices within seconds that a server is down; `uri` as `tracking_uri`
    gives it. `timeout` in seconds, unless MLFLOW_HTTP_REQUEST_TIMEOUT says otherwise."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout))
    for name, value in _REQUESTS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    # After the import, which sets levels of its own.
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # One warning a retry, of what is told once by whoever gives up.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    with _alone_in(uri):
        return MlflowClient(tracking_uri=_with_secrets(uri))


@contextmanager
def _alone_in(uri: str) -> Iterator[None]:
    """One process at a time: MLflow makes the tables of a new SQLite store as it opens it, and two
    that do so at once leave one that nobody can open any more."""
    if not uri.startswith(_SQLITE):
        yield
        return
    store = Path(uri.removeprefix(_SQLITE))
    with (store.parent / f".{store.name}.lock").open("a") as file:
        # A file system without locks is no worse than before.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_words(error: BaseException) -> str:
    """An error's kind and first line, without anything secret."""
    text = next(iter(str(error).splitlines()), "")
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, "***")
    return f"{type(error).__name__}: {without_secrets(text)}"


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The experiment of that name in the client's store, made if there is none.

    With a local store the artifacts lie beside it, not in the current folder.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith(_SQLITE):
        store = Path(uri.removeprefix(_SQLITE)).resolve()
        location = (store.parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another run's, a moment ago
        if found is None:
            raise
        return str(found.experiment_id)
