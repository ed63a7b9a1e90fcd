"""A served model in a process of its own, reached over HTTP.

Processes are forked by `serving_zygote.py`; they run the command as its program does.
`test_serve_command.py` starts the program itself.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from openai import OpenAI

_PATIENCE = 120.0


@functools.cache
def _zygote() -> subprocess.Popen:
    """The process that forks; it ends with this one, whose end of the pipe closes."""
    script = Path(__file__).with_name("serving_zygote.py")
    return subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ask(request: dict) -> int | None:
    zygote = _zygote()
    zygote.stdin.write(json.dumps(request) + "\n")
    zygote.stdin.flush()
    return json.loads(zygote.stdout.readline())


class Serving:
    """`ttt-megatron serve MODEL …`; waits until it listens, unless it ends before.

    status: its exit status, once it has ended. url: None if it ended before it listened.
    """

    def __init__(self, log: Path, model: Path, *options: str) -> None:
        self.log = log
        self.status: int | None = None
        self.pid = _ask({"start": [str(model), "--port", "0", *options], "log": str(log)})
        self.url = self._wait_for_url()
        if self.url:
            self.http = httpx.Client(base_url=self.url, timeout=_PATIENCE)
            self.client = OpenAI(
                base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=_PATIENCE
            )

    def complete(self, prompt: str | list[int], session: str | None = None, **more):
        """A completion by the openai client, greedy unless told otherwise."""
        extra = {} if session is None else {"session": session}
        values = {"model": "tiny", "temperature": 0, "max_tokens": 8} | more
        return self.client.completions.create(prompt=prompt, extra_body=extra, **values)

    def sessions(self) -> dict[str, dict]:
        """All sessions by name."""
        return {told["name"]: told for told in self.http.get("/v1/sessions").json()["data"]}

    def metric(self, name: str) -> float:
        """A counter's or gauge's value."""
        text = self.http.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def ended(self) -> bool:
        """Whether the process has ended."""
        if self.status is None:
            self.status = _ask({"status": self.pid})
        return self.status is not None

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        os.kill(self.pid, number)
        deadline = time.monotonic() + _PATIENCE
        while not self.ended():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        return self.status

    def close(self) -> None:
        """End it, if that has not happened."""
        if not self.ended():
            self.end(signal.SIGKILL)

    def _wait_for_url(self) -> str | None:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            text = self.log.read_text() if self.log.exists() else ""
            if found := re.search(r" at (http://\S+) ", text):
                return found[1]
            if self.ended():
                return None
            time.sleep(0.02)
        raise AssertionError(f"the service did not start: {self.log.read_text()}")
