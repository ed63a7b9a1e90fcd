"""What `read` and `generate` share: a text, the session that reads it, and the bar meanwhile."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ttt_megatron.cli.loaded_model import LoadedModel
    from ttt_megatron.serving.session import Session

STDIN = "-"

# Tokens read between two moves of the progress bar, at least.
_PROGRESS_TOKENS = 1024


def read_text(source: str, kind: str) -> str:
    """The text of a UTF-8 file, or of stdin for `-`, line ends as they are, as `prepare` reads it.

    `kind` names it in errors.

    Raises UserError if it cannot be read or is no UTF-8.
    """
    name = "stdin" if source == STDIN else source
    try:
        if source == STDIN:
            if sys.stdin.isatty():
                print(f"type the {kind}; Ctrl-D ends it", file=sys.stderr)
            content = sys.stdin.buffer.read()
        else:
            content = Path(source).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{kind} {name} cannot be read ({error.strerror}): give a file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{kind} {name} is not UTF-8 text (byte {error.start}): convert it first"
        ) from None


def open_session(loaded: "LoadedModel", state: str | None, no_inner_steps: bool) -> "Session":
    """A session of one sequence: fresh, or where the file `state` left off.

    A state goes on as it was read, with inner steps or without. Raises UserError for one that
    cannot be used.
    """
    from ttt_megatron.hf.state_ttt_e2e import StateError, read_state_info
    from ttt_megatron.serving.session import Session

    bos_id = loaded.tokenizer.bos_id
    inner_steps = False if no_inner_steps else None
    if state is None:
        return Session(loaded.learner, inner_steps=inner_steps, bos_id=bos_id)
    try:
        learnt = read_state_info(state)["fast_weights"] > 0
        if learnt and no_inner_steps:
            raise UserError(
                f"--no-inner-steps: {state} was read with inner steps and goes on with them; "
                "leave the option out, or read the document again with it"
            )
        session = Session(loaded.learner, inner_steps=learnt, bos_id=bos_id)
        session.load(state)
    except StateError as error:
        raise UserError(str(error)) from None
    return session


def rate(tokens: int, seconds: float) -> str:
    """How much and how fast."""
    return f"{tokens:,} tokens at {tokens / max(seconds, 1e-9):,.0f} tokens/s"


def read_tokens(session: "Session", tokens: "Tensor", chunk_size: int) -> str:
    """Reads [1, n], n ≥ 0, under a progress bar; returns how much and how fast."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    stride = chunk_size * max(1, _PROGRESS_TOKENS // chunk_size)
    console, total = Console(stderr=True), tokens.shape[1]
    start, first = time.perf_counter(), session.position
    with Progress(
        TextColumn("reading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("reading", total=total, rate="")
        for piece in tokens.split(stride, dim=1) if total else ():
            session.prefill(piece)
            done = session.position - first
            speed = f"{done / (time.perf_counter() - start):,.0f} tokens/s"
            progress.update(task, completed=done, rate=speed)
    return rate(total, time.perf_counter() - start)
