"""`ttt-megatron import`: bring another implementation's checkpoint in."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.exchange.import_checkpoint import OnArray

NAME = "import"
HELP = "Write a checkpoint of ours from one of another implementation."
EPILOG = """examples:
  ttt-megatron import --from jax checkpoints/125m-8k --tokenizer llama-3 --output runs/official-125m
  ttt-megatron import --from jax my-run/2500 --tokenizer bytes --output runs/mine \\
      model.window_size=64 model.rope_theta=5e5 model.norm_eps=1e-6 \\
      inner.chunk_size=16 inner.lr=1 inner.clip=1
  ttt-megatron import --from hf models/SmolLM-135M --output runs/smol
  ttt-megatron import --from hf models/SmolLM-135M --output runs/smol-e2e model.num_suffix_layers=8
  ttt-megatron import --from megatron gpt/iter_0001000 --tokenizer tok/ --output runs/gpt

--output becomes a run's folder: `training.init_from=FOLDER` trains on from it, `generate FOLDER`
and `evaluate FOLDER` run it. SOURCE of jax: a step's folder, or the run's (its last step). Weights
alone are brought in, as float32."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add(
        "--from",
        dest="kind",
        choices=["jax", "hf", "megatron"],
        required=True,
        help="what wrote it: the official JAX implementation, Hugging Face transformers (Llama, "
        "Mistral, Qwen3), or Megatron-LM's GPT",
    )
    add("source", metavar="SOURCE", help="the checkpoint's folder")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that SOURCE does not say, or that replace what it says",
    )
    add("--output", required=True, metavar="FOLDER", help="the run's folder to write; new or empty")
    add("--recipe", metavar="RECIPE", help="takes settings that SOURCE does not say from it")
    add(
        "--tokenizer",
        metavar="PATH|bytes|none",
        help="a tokenizer.json, a folder that holds one, raw bytes, or none (default: SOURCE's)",
    )
    add("--bos", metavar="TOKEN", help="token that opens documents (default: the tokenizer's)")
    add(
        "--rope-layout",
        choices=["half", "interleaved"],
        help="how heads are rotated, for a Megatron checkpoint that does not say: the halves of a "
        "head with one another, or neighbours",
    )


def run(args: argparse.Namespace) -> int:
    """Imports and says what; raises UserError for whatever the user can fix."""
    wrong = [word for word in args.overrides if "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]!r} is neither SOURCE nor key=value: give one SOURCE")
    from ttt_megatron.exchange.import_checkpoint import ImportOptions, import_checkpoint

    options = ImportOptions(
        kind=args.kind,
        source=Path(args.source),
        output=Path(args.output),
        recipe=None if args.recipe is None else Path(args.recipe),
        overrides=args.overrides,
        tokenizer=args.tokenizer,
        bos=args.bos,
        rope_layout=args.rope_layout,
    )
    with _progress_bar() as on_array:
        imported = import_checkpoint(options, on_array)
    for note in imported.notes:
        print(note, file=sys.stderr)
    print(
        f"{imported.kind}: {imported.parameters:,} parameters, float32, written to "
        f"{imported.checkpoint} and read back equal"
    )
    print(f"train on from it with training.init_from={options.output}")
    return 0


@contextmanager
def _progress_bar() -> Iterator["OnArray"]:
    """A bar on stderr, if that is a terminal; yields what `import_checkpoint` reports to."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("arrays  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("looking", total=None, rate="")
        start = time.perf_counter()

        def on_array(name: str, done: int, total: int) -> None:
            what = name or "writing and reading back"
            rate = f"{done / max(time.perf_counter() - start, 1e-9):.1f}/s"
            progress.update(task, completed=done, total=total, description=what, rate=rate)

        yield on_array
