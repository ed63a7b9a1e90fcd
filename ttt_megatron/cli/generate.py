"""`ttt-megatron generate`: read a prompt of any length and continue it."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.cli.loaded_model import add_model_arguments, load_model
from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ttt_megatron.data.tokenizer import Tokenizer
    from ttt_megatron.serving.sampling import Sampler
    from ttt_megatron.serving.session import Session

NAME = "generate"
HELP = "Read a prompt and continue it, learning from both while it goes."
EPILOG = """examples:
  ttt-megatron generate runs/demo --prompt 'def read(path):' --tokens 200
  ttt-megatron generate runs/demo --prompt-file book.txt --temperature 0.8 --top-p 0.95
  cat notes.txt | ttt-megatron generate runs/demo --greedy --tokens 50
  ttt-megatron generate runs/demo --prompt-file book.txt --no-inner-steps

The text goes to stdout as it comes; progress and a summary go to stderr. The prompt is a document's
beginning; generation ends early where the model opens a new document."""

# Tokens read between two moves of the progress bar, at least.
_PROGRESS_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue (default: stdin)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file of UTF-8 text to continue")
    add = parser.add_argument
    add("--tokens", type=int, default=256, metavar="N", help="at most (default: %(default)s)")
    add("--greedy", action="store_true", help="always the likeliest token (temperature 0)")
    add("--temperature", type=float, default=1.0, metavar="X", help="default: %(default)s")
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0 is all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens that sum to P; 1 is all",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 makes tokens already in the text less likely (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws (default: %(default)s)")
    add("--no-inner-steps", action="store_true", help="keep the weights as trained")


def run(args: argparse.Namespace) -> int:
    """Reads, then generates; raises UserError for whatever the user can fix."""
    if args.tokens < 0:
        raise UserError(f"--tokens {args.tokens}: give 0 or more")
    text = _read_prompt(args)
    import torch

    from ttt_megatron.serving.sampling import Sampler, SamplingSettings
    from ttt_megatron.serving.session import Session

    settings = SamplingSettings(
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    loaded = load_model(args.checkpoint, args.device)
    session = Session(
        loaded.learner,
        inner_steps=False if args.no_inner_steps else None,
        bos_id=loaded.tokenizer.bos_id,
    )
    sampler = Sampler(settings, args.seed, loaded.tokenizer.vocab_size)
    prompt = torch.from_numpy(loaded.tokenizer.encode_document(text)).unsqueeze(0)
    sampler.observe(prompt, loaded.config.model.vocab_size or 0)
    reading = _read(session, prompt, loaded.config.inner.chunk_size)
    generated = _write(session, sampler, args.tokens, loaded.tokenizer)
    drift = float(session.drift[0])
    print(
        f"read {reading}, generated {generated}; {session.steps_taken:,} inner steps, fast weights "
        f"moved by {drift:.2%} of their norm; state {session.nbytes / 1e6:.3g} MB; "
        f"kernels: {loaded.kernels}",
        file=sys.stderr,
    )
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    source = args.prompt_file or "stdin"
    try:
        if args.prompt_file:
            return Path(args.prompt_file).read_text(encoding="utf-8")
        if sys.stdin.isatty():
            print("type the prompt; Ctrl-D ends it", file=sys.stderr)
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"prompt {source} cannot be read ({error.strerror}): give a file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt {source} is not UTF-8 text (byte {error.start}): convert it first"
        ) from None


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens at {tokens / max(seconds, 1e-9):,.0f} tokens/s"


def _read(session: "Session", prompt: "Tensor", chunk_size: int) -> str:
    """Reads the prompt under a progress bar; returns how much and how fast."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    stride = chunk_size * max(1, _PROGRESS_TOKENS // chunk_size)
    console = Console(stderr=True)
    start = time.perf_counter()
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
        task = progress.add_task("reading", total=prompt.shape[1], rate="")
        for piece in prompt.split(stride, dim=1):
            session.prefill(piece)
            rate = f"{session.position / (time.perf_counter() - start):,.0f} tokens/s"
            progress.update(task, completed=session.position, rate=rate)
    return _rate(session.position, time.perf_counter() - start)


def _write(session: "Session", sampler: "Sampler", count: int, tokenizer: "Tokenizer") -> str:
    """Prints the continuation as it comes; returns how much and how fast."""
    from ttt_megatron.serving.generation import TextStream, generate

    stream, made = TextStream(tokenizer.decode), 0
    start = time.perf_counter()
    for token in generate(session, sampler, count):
        if int(token) == tokenizer.bos_id:
            break
        made += 1
        print(stream.push(int(token)), end="", flush=True)
    print(stream.finish(), flush=True)
    return _rate(made, time.perf_counter() - start)
