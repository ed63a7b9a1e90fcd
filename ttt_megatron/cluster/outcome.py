"""How an attempt at a run ended, in a file: torchrun's exit status tells no more than failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ttt_megatron.errors import PassingError, UserError

FINISHED = "finished"
STOPPED = "stopped"
"""Asked to end, it saved and did."""
REFUSED = "refused"
"""By an error that would come again at every attempt."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One of the three words, and what there is to say about it."""

    ended: str
    words: str


def read_outcome(path: Path) -> Outcome | None:
    """What the file says; None if the attempt has not ended, or without a word."""
    try:
        ended, _, words = path.read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        return None
    return Outcome(ended=ended, words=words)


def write_outcome(path: Path, ended: str, words: str = "") -> None:
    """Writes the file, in one line; several ranks may do so at once."""
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', '0')}.tmp")
    beside.write_text(f"{ended} {' '.join(words.split())}".strip() + "\n", encoding="utf-8")
    beside.replace(path)


@contextmanager
def telling_outcome(path: Path) -> Iterator[None]:
    """Writes down a UserError that passes, unless its cause may pass too."""
    try:
        yield
    except PassingError:
        raise
    except UserError as error:
        write_outcome(path, REFUSED, str(error))
        raise
