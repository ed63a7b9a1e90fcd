"""`ttt-megatron evaluate`: held-out loss by token position, inner steps on and off."""

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_megatron.cli.loaded_model import LoadedModel, add_model_arguments, load_model
from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.data.dataset import TokenDataset
    from ttt_megatron.data.tokenizer import Tokenizer
    from ttt_megatron.data.validation import ValidationSequences
    from ttt_megatron.evaluation.by_position import PerTokenLosses
    from ttt_megatron.evaluation.report import PositionReport

NAME = "evaluate"
HELP = "Measure held-out loss by token position, with inner steps and without."
EPILOG = """examples:
  ttt-megatron evaluate runs/demo
  ttt-megatron evaluate runs/demo --length 32768 --documents 100 --batch 1
  ttt-megatron evaluate runs/demo --control runs/plain --data data/other --output results

Prints a table and writes by_position.json, .md and .png. Each document is read from its start, with
fresh fast weights. Standard errors are over documents, differences paired by document."""

_STEM = "by_position"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--data", metavar="DIR", help="prepared data with a held-out part (default: the run's)")
    add("--control", metavar="CHECKPOINT_OR_RUN", help="another model to compare with")
    add(
        "--length",
        type=int,
        metavar="N",
        help="positions read of each document, which must be longer; 0 reads all documents whole "
        "(default: the run's sequence length)",
    )
    add(
        "--documents",
        type=int,
        default=64,
        metavar="N",
        help="documents at most, chosen at random but always the same; 0 is all "
        "(default: %(default)s)",
    )
    add("--batch", type=int, metavar="N", help="documents at once (default: the run's micro batch)")
    add(
        "--output", metavar="DIR", help="folder to write (default: evaluation/ in the run's folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluates; raises UserError for whatever the user can fix."""
    for name, least in (("length", 0), ("documents", 0), ("batch", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: give {least} or more")
    model = load_model(args.checkpoint, args.device)
    control = None if args.control is None else load_model(args.control, args.device)
    sequences = _choose_documents(args, model, control)
    report = _measure(model, control, sequences, args.batch)
    return _publish(report, model, Path(args.output or model.run_folder / "evaluation"))


def _choose_documents(
    args: argparse.Namespace, model: LoadedModel, control: LoadedModel | None
) -> "ValidationSequences":
    from ttt_megatron.data.dataset import open_dataset
    from ttt_megatron.data.tokenizer import load_tokenizer
    from ttt_megatron.data.validation import validation_sequences

    dataset = open_dataset(args.data or model.config.data.path, "validation")
    tokenizer = load_tokenizer(dataset.path)
    for loaded in filter(None, (model, control)):
        if not _same(tokenizer, loaded.tokenizer):
            kind = loaded.tokenizer.kind
            wanted = "bytes" if kind == "bytes" else loaded.tokenizer_folder
            raise UserError(
                f"{dataset.path} was prepared with another tokenizer than {loaded.checkpoint} was "
                f"trained with: prepare it with --tokenizer {wanted}"
            )
    length = model.config.data.sequence_length if args.length is None else args.length
    return validation_sequences(dataset, length or None, args.documents or None)


def _same(one: "Tokenizer", other: "Tokenizer") -> bool:
    return (one.kind, one.vocab_size, one.bos_id, one.serialized()) == (
        other.kind,
        other.vocab_size,
        other.bos_id,
        other.serialized(),
    )


def _ways(model: LoadedModel, control: LoadedModel | None) -> dict[str, tuple[LoadedModel, bool]]:
    """The curves: name, model, and whether inner steps are taken."""

    def steps(loaded: LoadedModel) -> bool:
        return loaded.config.inner.mode != "off" and loaded.config.model.num_suffix_layers > 0

    ways = {"on": (model, True)} if steps(model) else {}
    ways["off"] = (model, False)
    if control is not None:
        ways["control"] = (control, steps(control))
    return ways


def _measure(
    model: LoadedModel,
    control: LoadedModel | None,
    sequences: "ValidationSequences",
    batch: int | None,
) -> "PositionReport":
    from ttt_megatron.evaluation.by_position import evaluate_by_position
    from ttt_megatron.evaluation.report import PositionReport
    from ttt_megatron.evaluation.statistics import position_buckets, sum_buckets

    ways = _ways(model, control)
    losses: dict[str, PerTokenLosses] = {}
    speed: dict[str, float] = {}
    for name, (loaded, inner_steps) in ways.items():
        start = time.perf_counter()
        with _progress_bar(name, len(sequences)) as on_progress:
            losses[name] = evaluate_by_position(
                loaded.learner,
                (sequence.tokens for sequence in sequences),
                inner_steps=inner_steps,
                batch=batch or loaded.config.training.micro_batch_size,
                bos_id=loaded.tokenizer.bos_id,
                on_progress=on_progress,
            )
        tokens = sum(map(len, losses[name].nll))
        speed[name] = round(tokens / (time.perf_counter() - start), 1)
    buckets = position_buckets(losses["off"].longest)
    texts = (model.tokenizer.decode(sequence.tokens[1:].numpy()) for sequence in sequences)
    return PositionReport(
        buckets=buckets,
        curves={name: sum_buckets(each, buckets) for name, each in losses.items()},
        documents=[sequence.name for sequence in sequences],
        document_bytes=[len(text.encode("utf-8")) for text in texts],
        about={
            **_about(model, control, sequences.dataset),
            "length": sequences.length,
            "tokens_per_second": speed,
        },
    )


def _about(
    model: LoadedModel, control: LoadedModel | None, dataset: "TokenDataset"
) -> dict[str, Any]:
    return {
        "checkpoint": str(model.checkpoint),
        "name": model.config.name,
        "step": model.info.step,
        "control": None if control is None else str(control.checkpoint),
        "data": str(dataset.path),
        "data_fingerprint": dataset.fingerprint,
        "kernels": model.kernels,
        "window_size": model.config.model.window_size,
        "chunk_size": model.config.inner.chunk_size,
    }


@contextmanager
def _progress_bar(name: str, documents: int) -> Iterator[Any]:
    """A bar on stderr; yields what `evaluate_by_position` reports its progress to."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("inner steps {task.description}" if name != "control" else "{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    start, read = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=documents, rate="")

        def on_progress(rows: int, tokens: int) -> None:
            nonlocal read
            read += tokens
            rate = f"{read / (time.perf_counter() - start):,.0f} tokens/s"
            progress.update(task, advance=rows, rate=rate)

        yield on_progress


def _publish(report: "PositionReport", model: LoadedModel, output: Path) -> int:
    """Prints the table, writes the files, logs them to the run."""
    from rich.console import Console

    from ttt_megatron.evaluation.plot import draw_by_position
    from ttt_megatron.evaluation.report import write_files
    from ttt_megatron.evaluation.tracking import log_evaluation
    from ttt_megatron.training.callbacks.tracking import read_tracking

    table = report.table()
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)
    print(f"kernels: {model.kernels}")
    files = write_files(report, output, _STEM)
    plot = output / f"{_STEM}.png"
    title = f"{model.config.name}, step {model.info.step}"
    draw_by_position(report, plot, title, model.config.model.window_size)
    for path in (*files, plot):
        print(path)
    tracked = read_tracking(model.run_folder)
    if tracked:
        _show_warnings()
        step = model.info.step
        uri, run_id = tracked["uri"], tracked["run_id"]
        if log_evaluation(uri, run_id, report.metrics(), step, [*files, plot]):
            print(f"logged to MLflow run {run_id} at {uri}")
    return 0


def _show_warnings() -> None:
    ours = logging.getLogger("ttt_megatron")
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler(sys.stderr))
