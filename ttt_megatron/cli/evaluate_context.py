"""`evaluate --task context`: loss of the same tokens under growing context."""

import argparse

from ttt_megatron.cli.evaluate_models import Evaluated
from ttt_megatron.cli.evaluate_output import progress_bar, publish_task, way_label
from ttt_megatron.cli.number_lists import whole_numbers
from ttt_megatron.errors import UserError

OPTIONS = ("contexts",)


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the task's own options."""
    group.add_argument(
        "--contexts",
        metavar="N,N,...",
        help="contexts in tokens (default: 256, 512, ... up to --length)",
    )


def run(evaluated: Evaluated, args: argparse.Namespace) -> None:
    """Measures and publishes."""
    from ttt_megatron.evaluation.context_length import (
        ContextCurves,
        check_contexts,
        context_report,
        doubling_contexts,
        losses_by_context,
    )
    from ttt_megatron.evaluation.context_plot import draw_by_context

    sequences = evaluated.long_sequences("context")
    length = evaluated.length or 0
    last = measured_tokens(args, length)
    contexts = whole_numbers(args.contexts, "contexts") or doubling_contexts(length, last)
    if max(contexts) > length:
        raise UserError(
            f"--contexts {max(contexts)} is above the {length} tokens read of each document: "
            f"give --length {max(contexts)}"
        )
    check_contexts(contexts, last)
    documents = [sequence.tokens for sequence in sequences]
    curves = {}
    for name, way in evaluated.ways.items():
        with progress_bar(way_label(name), len(documents) * len(contexts)) as on_progress:
            curves[name] = losses_by_context(
                way.loaded.learner,
                documents,
                contexts,
                last,
                inner_steps=way.inner_steps,
                batch=way.batch(evaluated.batch),
                bos_id=way.loaded.tokenizer.bos_id,
                on_progress=on_progress,
            )
    found = ContextCurves(contexts, curves)
    names = [sequence.name for sequence in sequences]
    report = context_report(found, last, names, evaluated.about("context"))
    window = evaluated.model.config.model.window_size
    title = f"last {last:,} tokens of {len(documents)} documents"
    publish_task(
        evaluated,
        report,
        lambda path, model: draw_by_context(found, path, f"{model}: {title}", window),
    )


def measured_tokens(args: argparse.Namespace, length: int) -> int:
    """`--last`, or 128 tokens, or half of what is read if that is less."""
    last = max(1, min(128, length // 2)) if args.last is None else int(args.last)
    if not 1 <= last < length:
        raise UserError(f"--last {last}: give 1 or more, and less than --length, {length}")
    return last
