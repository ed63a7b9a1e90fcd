"""`ttt-megatron read`: read a document once and keep what was learnt from it."""

import argparse
import os
import tempfile
from pathlib import Path

from ttt_megatron.cli.loaded_model import load_model
from ttt_megatron.cli.reading import STDIN, open_session, read_text, read_tokens
from ttt_megatron.errors import UserError

NAME = "read"
HELP = "Read a document once and save what the model learnt from it."
EPILOG = """examples:
  ttt-megatron read book.txt --model runs/demo --save book.state
  ttt-megatron generate runs/demo --state book.state --prompt 'In short, the book says'
  ttt-megatron read appendix.txt --model runs/demo --state book.state --save whole.state
  ttt-megatron read book.txt --model runs/demo --save small.state --change rank:16

The state holds the fast weights as the document left them, the window's keys and values and the
chunk that is not full yet. It belongs to the model that read it, and to no other. With --state the
document goes on where an earlier one ended, as if both were one text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("document", metavar="DOCUMENT", help="file of UTF-8 text; - is stdin")
    add("--model", required=True, metavar="MODEL", help="as `ttt-megatron generate` takes it")
    add("--save", required=True, metavar="STATE", help="the file to write")
    add("--state", metavar="STATE", help="go on from what an earlier `read` saved")
    add(
        "--change",
        default="exact",
        metavar="KIND",
        help="how the fast weights are kept: exact, to the bit; bf16, their change rounded to "
        "bfloat16; rank:R, the best rank-R approximation of their change (default: %(default)s)",
    )
    add("--no-inner-steps", action="store_true", help="keep the weights as trained")
    add("--force", action="store_true", help="replace an older state of the same name")
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to compute; auto is the GPU if there is one (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Reads, then saves; raises UserError for whatever the user can fix."""
    text = _read_document(args.document)
    save = Path(args.save)
    _check_place(save, args.document, args.force)
    import torch

    from ttt_megatron.hf.state_ttt_e2e import StateError, parse_change

    try:
        parse_change(args.change)
    except StateError as error:
        raise UserError(f"--{error}") from None
    loaded = load_model(args.model, args.device)
    session = open_session(loaded, args.state, args.no_inner_steps)
    tokenizer = loaded.tokenizer
    encode = tokenizer.encode_array if args.state else tokenizer.encode_document
    tokens = torch.from_numpy(encode(text)).unsqueeze(0)
    reading = read_tokens(session, tokens, loaded.learner.inner.chunk_size)
    try:
        saved = session.save(save, change=args.change)
    except StateError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(
            f"--save {save} cannot be written ({error.strerror or error}): make room, or choose "
            "another place, and read again"
        ) from None
    lost = f" (off by {saved['error']:.2%} of their change)" if args.change != "exact" else ""
    print(
        f"read {reading}, {session.position:,} in all; {session.steps_taken:,} inner steps, fast "
        f"weights moved by {saved['drift']:.2%} of their norm; {save}: "
        f"{int(saved['bytes']) / 1e6:.3g} MB, fast weights {args.change}{lost}"
    )
    return 0


def _read_document(source: str) -> str:
    text = read_text(source, "document")
    name = "stdin" if source == STDIN else source
    if not text:
        raise UserError(f"document {name} is empty: give a text to read")
    if "\0" in text:
        place = len(text[: text.index("\0")].encode())
        raise UserError(f"document {name} is no text (byte {place} is NUL): convert it first")
    return text


def _check_place(save: Path, document: str, force: bool) -> None:
    """Raises UserError unless a state can be written there, before the long reading."""
    try:
        if save.is_dir():
            raise UserError(f"--save {save} is a folder: name a file in it")
        if not save.parent.is_dir():
            raise UserError(f"--save {save}: there is no folder {save.parent}, make it first")
        if save.exists():
            _check_replaced(save, document, force)
        # The very thing that saving will do: permissions do not tell of a read-only disk.
        descriptor, name = tempfile.mkstemp(".tmp", f".{save.name}.", save.parent)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise UserError(
            f"--save {save} cannot be written ({error.strerror}): choose another place"
        ) from None


def _check_replaced(save: Path, document: str, force: bool) -> None:
    from ttt_megatron.hf.state_ttt_e2e import StateError, read_state_info

    if document != STDIN and save.samefile(document):
        raise UserError(f"--save {save} is the document itself: choose another file")
    if not force:
        raise UserError(f"--save {save} exists: choose another file, or replace it with --force")
    try:
        read_state_info(save)
    except StateError:
        raise UserError(
            f"--save {save} exists and holds something other than a state: choose another file, "
            "or remove it first"
        ) from None
