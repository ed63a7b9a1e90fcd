"""How a service runs."""

import re
from dataclasses import dataclass
from pathlib import Path

from ttt_megatron.errors import UserError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{unit}i": 1024**i for i, unit in enumerate("kmgt", start=1)}


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How a service runs. Raises UserError for numbers that make no sense.

    memory: bytes that sessions and rows being answered may take, weights apart.
    session_dir: where sessions go when memory is short and at the end; None keeps them in memory
    alone. states_dir: where files of adapted states lie that sessions may start from.
    max_batch: requests answered at a time; max_queue: how many more may wait. max_wait: seconds a
    request may wait for memory that others use.
    save_every_request: write a session's file before its request counts as answered.
    """

    memory: int = 4 * 1024**3
    session_dir: Path | None = None
    states_dir: Path | None = None
    max_batch: int = 16
    max_queue: int = 256
    max_wait: float = 30.0
    max_prompt_tokens: int = 1_000_000
    max_body_bytes: int = 64 * 1024**2
    save_every_request: bool = False

    def __post_init__(self) -> None:
        wrong = {
            "memory": (self.memory > 0, "a size above 0, such as 4GiB"),
            "max-batch": (self.max_batch >= 1, "1 or more"),
            "max-queue": (self.max_queue >= 0, "0 or more"),
            "max-wait": (self.max_wait >= 0, "0 seconds or more"),
            "max-prompt-tokens": (self.max_prompt_tokens >= 1, "1 or more"),
            "max-body": (self.max_body_bytes >= 1024, "1KiB or more"),
        }
        for name, (fine, allowed) in wrong.items():
            if not fine:
                value = getattr(
                    self, {"max-body": "max_body_bytes"}.get(name, name.replace("-", "_"))
                )
                raise UserError(f"--{name} {value}: give {allowed}")
        if self.save_every_request and self.session_dir is None:
            raise UserError("--save-every-request needs a place for the files: give --session-dir")


def parse_bytes(text: str, option: str) -> int:
    """`4GiB`, `500MB`, `1048576` in bytes; UserError, naming the option, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"--{option} {text}: give a size such as 4GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])
