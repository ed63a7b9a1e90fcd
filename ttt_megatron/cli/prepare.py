"""`ttt-megatron prepare`: text to tokenised shards."""

import argparse
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ttt_megatron.data.prepare import (
    DEFAULT_SHARD_TOKENS,
    PrepareOptions,
    PrepareProgress,
    PrepareReport,
    prepare,
)

NAME = "prepare"
HELP = "tokenise text into shards that training and evaluation read"
EPILOG = """examples:
  ttt-megatron prepare texts/ --output data/texts --tokenizer bpe:4096
  ttt-megatron prepare /usr/lib/python3.11 --include '*.py' --exclude 'encodings' --output data/py
  ttt-megatron prepare train.jsonl.gz --validation-input val.jsonl.gz --output data/books \\
      --tokenizer path/to/tokenizer.json --bos '<s>'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `prepare`."""
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="text file, folder (recursive; hidden entries are left out), .jsonl or .jsonl.gz",
    )
    add("--output", required=True, metavar="DIR", help="folder to write")
    add(
        "--tokenizer",
        default="bytes",
        metavar="KIND",
        help="bytes, bpe:SIZE (trained on the training documents; SIZE counts everything), or a "
        "local Hugging Face tokenizer.json or its folder (default: %(default)s)",
    )
    add("--bos", metavar="TOKEN", help="token that opens documents, if the tokenizer names none")
    add(
        "--validation",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the documents held out; 0 is none (default: %(default)s)",
    )
    add(
        "--validation-input",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help="hold out these files instead of a share",
    )
    add(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="take only files of folders whose name or path matches (repeatable)",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave out files of folders whose name, path or parent matches (repeatable)",
    )
    add("--text-field", default="text", metavar="NAME", help="JSONL field (default: %(default)s)")
    add(
        "--non-utf8",
        choices=["error", "skip"],
        default="error",
        help="documents that are not UTF-8: stop, or leave them out (default: %(default)s)",
    )
    add("--workers", type=int, metavar="N", help="processes (default: one a usable CPU)")
    add(
        "--shard-tokens",
        type=int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="tokens a shard, about (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the split (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace DIR if it holds prepared data")


def run(args: argparse.Namespace) -> int:
    """Prepares, with a progress bar on stderr and a table on stdout."""
    options = PrepareOptions(
        inputs=tuple(args.inputs),
        output=args.output,
        tokenizer=args.tokenizer,
        bos=args.bos,
        validation=args.validation,
        validation_inputs=tuple(args.validation_input),
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        text_field=args.text_field,
        non_utf8=args.non_utf8,
        workers=args.workers,
        shard_tokens=args.shard_tokens,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    with _ProgressBars() as bars:
        report = prepare(options, bars.update)
    _print_report(report)
    return 0


class _ProgressBars:
    """A bar for each phase: documents and text per second, time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> "_ProgressBars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, state: PrepareProgress) -> None:
        """Shows how far `state.phase` has come."""
        if state.phase not in self._tasks:
            task = self._progress.add_task(state.phase, total=state.total, rate="")
            self._tasks[state.phase] = (task, time.monotonic())
        task, start = self._tasks[state.phase]
        seconds = max(time.monotonic() - start, 1e-9)
        rate = (
            f"{state.documents / seconds:,.0f} docs/s {state.text_bytes / seconds / 1e6:.1f} MB/s"
        )
        self._progress.update(task, completed=state.consumed, rate=rate)


def _print_report(report: PrepareReport) -> None:
    index = report.index
    table = Table(title=f"{index.vocab_size:,} token ids, stored as {index.dtype}")
    table.add_column("")
    for name in index.splits:
        table.add_column(name, justify="right", no_wrap=True)
    splits = index.splits.values()
    for label, cells in {
        "documents": [f"{split.documents:,}" for split in splits],
        "tokens": [f"{split.tokens:,}" for split in splits],
        "longest document, tokens": [f"{split.longest_document:,}" for split in splits],
        "text, bytes": [f"{split.text_bytes:,}" for split in splits],
        "bytes a token": [f"{split.text_bytes / split.tokens:.3f}" for split in splits],
        "shards": [f"{len(split.shards):,}" for split in splits],
    }.items():
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    if report.empty_documents or report.non_utf8_documents:
        console.print(
            f"passed over: {report.empty_documents} empty documents, "
            f"{report.non_utf8_documents} that are not UTF-8"
        )
    for name, split in index.splits.items():
        first, last = split.shards[0].file, split.shards[-1].file
        files = first if first == last else f"{first} … {last}"
        console.print(
            f"{name}: {report.output}/{files}", soft_wrap=True, highlight=False, markup=False
        )
