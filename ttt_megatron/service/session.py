"""One named session, as the pool keeps it."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

from ttt_megatron.hf.cache_ttt_e2e import TTTE2ECache
from ttt_megatron.service.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(kw_only=True, eq=False)
class Session:
    """A text that goes on from request to request.

    cache: its state if it is in memory and no request has it. file_bytes: size of its file, 0 for
    none; unsaved: whether it has gone on since that was written. refused: why it cannot be used.
    in_use: whether a request goes on with it. drift: as it was after so many drift_steps. turn:
    grows with each use, for least recently used.
    """

    name: str
    cache: TTTE2ECache | None = None
    file_bytes: int = 0
    unsaved: bool = False
    in_use: bool = False
    refused: str | None = None
    position: int = 0
    steps: int = 0
    drift: float = 0.0
    drift_steps: int = 0
    last_used: float = field(default_factory=time.time)
    turn: int = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes it takes in memory while no request has it."""
        return 0 if self.cache is None else self.cache.nbytes

    def describe(self) -> dict[str, Any]:
        """What clients are told of it."""
        where = "disk" if self.cache is None else "memory"
        told: dict[str, Any] = {
            "object": "session",
            "name": self.name,
            "position": self.position,
            "steps": self.steps,
            "drift": self.drift,
            "where": "refused" if self.refused else "in use" if self.in_use else where,
            "memory_bytes": self.memory_bytes,
            "file_bytes": self.file_bytes,
            "saved": not self.unsaved and not self.in_use,
            "last_used": round(self.last_used, 3),
        }
        return told | ({"error": self.refused} if self.refused else {})


def checked_name(name: str, field: str = "session") -> str:
    """The name, if a session can have it; RequestError 400 otherwise."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            400,
            f"{field} {name[:120]!r}: a session's name has 1 to 100 letters, digits, '.', '_' or "
            "'-', and begins with a letter or a digit",
            field=field,
        )
    return name
