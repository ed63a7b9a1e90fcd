"""What a failing rank leaves for the launcher that started it."""

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

from ttt_megatron.errors import PassingError, UserError

_folder: Path | None = None


class WorkerError(Exception):
    """A worker process crashed; the message names its rank and tells why or how."""


def keep_accounts_in(folder: Path) -> None:
    """Where this rank's account goes, from now on."""
    global _folder
    _folder = folder


def leave_account(error: BaseException) -> None:
    """Writes down what this rank fails of; nothing where no launcher asked for it."""
    if _folder is None:
        return
    rank = int(os.environ["RANK"])
    account = {
        "rank": rank,
        "time": time.time(),
        "user": isinstance(error, UserError),
        "passing": isinstance(error, PassingError),
        "told": isinstance(error, UserError | WorkerError),
        "message": str(error) or type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }
    beside = _folder / f"rank-{rank}.tmp"
    beside.write_text(json.dumps(account))
    beside.rename(beside.with_suffix(".json"))


def read_accounts(folder: Path) -> list[dict[str, Any]]:
    """What was left there."""
    return [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]


def device_error(message: str) -> UserError:
    """What to raise for a GPU that is not there.

    A PassingError where torchrun started this rank, rather than `launch` or a user by hand: a GPU
    may have failed, and the next attempt be on other nodes.
    """
    outside = "RANK" in os.environ and _folder is None
    return (PassingError if outside else UserError)(message)
