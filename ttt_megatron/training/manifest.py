"""What makes a checkpoint folder complete: every file, its size and its SHA-256, in one list."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
Entries = dict[str, dict[str, int | str]]
"""Size and SHA-256 of files, by their names within the folder."""

_BLOCK = 1 << 22


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def sync_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_files(folder: Path, files: Sequence[Path]) -> Entries:
    """The manifest's entries of files somewhere in the folder."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, files))
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }


def write_manifest(folder: Path, written: Entries | None = None) -> None:
    """Lists the folder's files in manifest.json; files, folders and the list are on disk after.

    `written` are the entries of files that were described and put on disk before, by any process.

    Raises OSError if one of those cannot be seen from here as it was written.
    """
    written = written or {}
    for name, entry in written.items():
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            raise OSError(f"{folder / name} has {size} bytes instead of {entry['bytes']}")
    files = _files(folder)
    others = [path for path in files if str(path.relative_to(folder)) not in written]
    with ThreadPoolExecutor() as pool:
        list(pool.map(sync_to_disk, others))
    entries = dict(sorted({**written, **describe_files(folder, others)}.items()))
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    sync_to_disk(manifest)
    for inner in sorted({path.parent for path in files} | {folder}):
        sync_to_disk(inner)


def find_damage(folder: Path, *, hashes: bool = True) -> str | None:
    """The first thing wrong with a checkpoint folder, or None if it is complete.

    With `hashes=False` only the manifest's presence and the files' sizes are looked at.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    if hashes:
        with ThreadPoolExecutor() as pool:
            digests = pool.map(_sha256, [folder / name for name in entries])
            for (name, entry), digest in zip(entries.items(), digests, strict=True):
                if digest != entry["sha256"]:
                    return f"{name} is not what was written (its SHA-256 differs)"
    return None
