"""The folder where sessions lie: one file of an adapted state each, written whole or not at all."""

import fcntl
import os
import re
import shutil
from pathlib import Path

from ttt_megatron.errors import UserError

_SUFFIX = ".safetensors"
# What a writer that was killed leaves: no name that a session can have.
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


class SessionStore:
    """Files of sessions in a folder that this process alone uses, for as long as it lives."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder; UserError if it cannot be used or another service does."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"--session-dir {folder} cannot be used ({error.strerror}): give another folder"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--session-dir {folder} is used by another service: end that one, or give this "
                "one a folder of its own"
            ) from None
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Where a session's file is, or would be."""
        return self.folder / f"{name}{_SUFFIX}"

    def names(self) -> list[str]:
        """Sessions that have a file."""
        return sorted(p.name.removesuffix(_SUFFIX) for p in self.folder.glob(f"[!.]*{_SUFFIX}"))

    def copy(self, source: str, target: str) -> None:
        """Another session with the same state; OSError if it cannot be written."""
        beside = self.folder / f".{target}.{os.urandom(16).hex()}.tmp"
        try:
            shutil.copyfile(self.path(source), beside)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, self.path(target))
        finally:
            beside.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a session's file, if there is one; OSError if that is not possible."""
        self.path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()
