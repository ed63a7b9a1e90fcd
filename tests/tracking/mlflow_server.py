"""A real `mlflow server` in processes of its own, which can be killed and come back."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

_START_SECONDS = 240.0
ADMIN, ADMIN_PASSWORD = "admin", "a-long-admin-password"


class Server:
    """MLflow's server on a free port, its backend in SQLite unless another is given."""

    def __init__(self, folder: Path, *, backend: str | None = None, auth: bool = False) -> None:
        self._folder = folder
        self._backend = backend or f"sqlite:///{folder / 'server.db'}"
        self._auth = auth
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--backend-store-uri", self._backend, "--host", "127.0.0.1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        command += ["--port", str(self.port)] + (["--app-name", "basic-auth"] if self._auth else [])
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_without_mlflow(os.environ), **self._environment()},
                start_new_session=True,
            )
        end = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < end, (self._folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """At once, with its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _environment(self) -> dict[str, str]:
        # Its workers for jobs are nothing to us, and take a minute to start.
        values = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        if self._auth:
            config = self._folder / "auth.ini"
            config.write_text(
                "[mlflow]\ndefault_permission = READ\n"
                f"database_uri = sqlite:///{self._folder / 'auth.db'}\n"
                f"admin_username = {ADMIN}\nadmin_password = {ADMIN_PASSWORD}\n"
                "authorization_function = "
                "mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            values["MLFLOW_AUTH_CONFIG_PATH"] = str(config)
            values["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "not secret here"
        return values

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False


def _without_mlflow(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}
