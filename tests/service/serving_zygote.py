"""Imports once what a service needs, which takes longer than most tests, and forks services.

Reads one JSON object a line: {"start": arguments, "log": file} answers with a process id,
{"status": id} with its exit status, or null while it runs.
"""

import json
import os
import sys

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import ttt_megatron.service.server
import ttt_megatron.service.service  # noqa: F401
from ttt_megatron.cli.main import main


def start(arguments: list[str], log: str) -> int:
    """A process that runs the command and prints to a file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = main(["serve", *arguments])
    finally:
        sys.stderr.flush()
        os._exit(status)


def status(pid: int) -> int | None:
    """A process's exit status, negative for a signal; None while it runs."""
    found, code = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(code) if found else None


if __name__ == "__main__":
    # Compiles a thousand regular expressions, whatever the model.
    get_checkpoint_conversion_mapping("none")
    for line in sys.stdin:
        asked = json.loads(line)
        answer = (
            start(asked["start"], asked["log"]) if "start" in asked else status(asked["status"])
        )
        print(json.dumps(answer), flush=True)
