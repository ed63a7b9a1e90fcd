"""`ttt-megatron generate`: read a prompt of any length and continue it."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from ttt_megatron.cli.loaded_model import add_model_arguments, load_model
from ttt_megatron.cli.reading import STDIN, open_session, rate, read_text, read_tokens
from ttt_megatron.errors import UserError

if TYPE_CHECKING:
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
  ttt-megatron generate runs/demo --state book.state --prompt 'In short, the book says'

The text goes to stdout as it comes; progress and a summary go to stderr. The prompt is a document's
beginning; generation ends early where the model opens a new document.

With --state the document that `ttt-megatron read` read goes on: with the prompt, if one is given,
and then as the model continues it. The file is not changed. It holds no text, so the repetition
penalty counts the prompt and what is generated alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="what to continue (default: stdin; nothing with --state)"
    )
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="file of UTF-8 text to continue; - is stdin"
    )
    add = parser.add_argument
    add("--state", metavar="STATE", help="go on from what `ttt-megatron read` saved")
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

    settings = SamplingSettings(
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    loaded = load_model(args.checkpoint, args.device)
    tokenizer = loaded.tokenizer
    session = open_session(loaded, args.state, args.no_inner_steps)
    went_on = f"went on from token {session.position:,} of {args.state}, " if args.state else ""
    sampler = Sampler(settings, args.seed, tokenizer.vocab_size)
    encode = tokenizer.encode_array if args.state else tokenizer.encode_document
    prompt = torch.from_numpy(encode(text)).unsqueeze(0)
    sampler.observe(prompt, loaded.config.model.vocab_size or 0)
    reading = read_tokens(session, prompt, loaded.config.inner.chunk_size)
    generated = _write(session, sampler, args.tokens, tokenizer)
    drift = float(session.drift[0])
    print(
        f"{went_on}read {reading}, generated {generated}; "
        f"{session.steps_taken:,} inner steps, fast weights moved by {drift:.2%} of their "
        f"norm; state {session.nbytes / 1e6:.3g} MB; "
        f"kernels: {loaded.kernels}",
        file=sys.stderr,
    )
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if args.prompt_file is None and args.state is not None:
        return ""
    return read_text(args.prompt_file or STDIN, "prompt")


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
    return rate(made, time.perf_counter() - start)
