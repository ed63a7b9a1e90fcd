"""Finding documents: text files, folders of them, JSONL and gzipped JSONL."""

import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ttt_megatron.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")


class NotUtf8Error(UserError):
    """A document whose bytes are no UTF-8 text."""


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    Attributes:
        path: where it lies.
        name: path relative to the folder given, or the file's name; POSIX separators.
        split: "train" or "validation" if fixed by the caller, None if drawn by document.
        size: bytes on disk.
    """

    path: Path
    name: str
    split: str | None
    size: int

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document; otherwise the file is one."""
        return self.name.endswith(JSONL_SUFFIXES)


@dataclass(frozen=True)
class RawDocument:
    """A document not yet read (`line` None: all of `source`) or not yet parsed.

    `consumed` counts the bytes of the input file passed by reading this far, for progress.
    """

    source: SourceFile
    line: int | None
    data: bytes | None
    consumed: int


def find_files(
    inputs: Sequence[Path | str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    split: str | None = None,
    skip: Path | None = None,
) -> list[SourceFile]:
    """Lists the files of `inputs` in order; folders recursively, sorted, hidden entries left out.

    A pattern of `include` or `exclude` is matched against a file's name, its path relative to the
    folder given, and that path's parents. Files given by themselves are always taken. The folder
    `skip` (the output) is passed over.

    Raises UserError for a path that is missing, not local, or yields no file.
    """
    files: list[SourceFile] = []
    for item in inputs:
        if "://" in str(item):
            raise UserError(f"{item} is not a local path: download it first")
        path = Path(item)
        if path.is_file():
            files.append(SourceFile(path, path.name, split, path.stat().st_size))
        elif path.is_dir():
            found = list(_walk(path, include, exclude, split, skip))
            if not found:
                chosen = f" that pass --include {' '.join(include)}" if include else ""
                raise UserError(
                    f"{path} holds no files{chosen}: check the folder, --include and --exclude"
                )
            files.extend(found)
        else:
            raise UserError(f"input {path} does not exist: check the path")
    return files


def _walk(
    root: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    split: str | None,
    skip: Path | None,
) -> Iterator[SourceFile]:
    found: list[tuple[str, Path]] = []
    skipped = skip.resolve() if skip is not None else None
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (Path(folder) / name).resolve() != skipped
        ]
        for name in names:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if name.startswith(".") or not path.is_file() or _matches(relative, exclude):
                continue
            if not include or _matches(relative, include):
                found.append((relative, path))
    for relative, path in sorted(found):
        yield SourceFile(path, relative, split, path.stat().st_size)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}; see its permissions")


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    parts = relative.split("/")
    candidates = [parts[-1], *("/".join(parts[:end]) for end in range(1, len(parts) + 1))]
    return any(
        fnmatch.fnmatchcase(candidate, pattern.rstrip("/"))
        for pattern in patterns
        for candidate in candidates
    )


def raw_documents(files: Sequence[SourceFile]) -> Iterator[RawDocument]:
    """Yields the documents of `files` in order; text files unread, JSONL lines unparsed."""
    for source in files:
        if source.is_jsonl:
            yield from _lines(source)
        else:
            yield RawDocument(source, None, None, source.size)


def _lines(source: SourceFile) -> Iterator[RawDocument]:
    number = reported = 0
    try:
        with ExitStack() as stack:
            file = stack.enter_context(open(source.path, "rb"))
            compressed = source.name.endswith(".gz")
            lines = stack.enter_context(gzip.open(file)) if compressed else file
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    # Where the file under the decompression stands is what progress is made of.
                    position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
                    yield RawDocument(source, number, line, position - reported)
                    reported = position
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{source.path} cannot be read after line {number}: {error}; restore the file"
        ) from error


def read_document(raw: RawDocument, text_field: str) -> tuple[str, str]:
    """Reads one document; returns its name and its text.

    The name is the file's, for JSONL the line's `id` or else `file:line`.

    Raises NotUtf8Error, or UserError for unreadable files, broken JSON and missing fields.
    """
    path = raw.source.path
    if raw.data is None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        return raw.source.name, _decode(data, str(path))
    where = f"{path}, line {raw.line}"
    try:
        record = json.loads(_decode(raw.data, where))
    except ValueError as error:
        raise UserError(f"{where}: broken JSON ({error}); every line must be an object") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}; every line must be an object")
    text = record.get(text_field)
    if not isinstance(text, str):
        problem = "is not a string" if text_field in record else "is missing"
        raise UserError(
            f"{where}: field {text_field!r} {problem}; the fields are "
            f"{', '.join(map(repr, record))}: choose one with --text-field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotUtf8Error(
            f"{where}: field {text_field!r} holds a lone surrogate at character {error.start}, "
            "which UTF-8 cannot hold: repair the line or pass --non-utf8 skip"
        ) from error
    name = record.get("id")
    return (str(name) if name is not None else f"{raw.source.name}:{raw.line}"), text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotUtf8Error(
            f"{where} is not UTF-8 text (byte {error.start}): convert it, leave it out with "
            "--exclude, or pass --non-utf8 skip"
        ) from error
