"""A folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ttt_megatron.data.index import INDEX_FILE
from ttt_megatron.errors import UserError


def check_output(output: Path, overwrite: bool) -> None:
    """Raises UserError if `output` exists, unless it is prepared data to be overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / INDEX_FILE).is_file():
        raise UserError(f"{output} exists and holds other things: choose another --output")
    if not overwrite:
        raise UserError(f"{output} exists: choose another --output, or replace it with --overwrite")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place if the block succeeds.

    Raises UserError if nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        if output.is_dir() and any(output.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
            os.rename(output, old)
            try:
                os.rename(folder, output)
            except OSError:
                os.rename(old, output)
                raise
            shutil.rmtree(old)
        else:
            os.rename(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
