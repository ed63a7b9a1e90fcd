"""`evaluate --task leakage`: what losses depend on and must not, and whether context is used."""

import argparse
from typing import TYPE_CHECKING

from ttt_megatron.cli.evaluate_context import measured_tokens
from ttt_megatron.cli.evaluate_models import Evaluated, Way
from ttt_megatron.cli.evaluate_output import progress_bar, publish_task, way_label
from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ttt_megatron.evaluation.leakage_report import LeakageResults

OPTIONS: tuple[str, ...] = ()


def run(evaluated: Evaluated, args: argparse.Namespace) -> None:
    """Checks and publishes."""
    from ttt_megatron.evaluation.leakage_plot import draw_leakage
    from ttt_megatron.evaluation.leakage_report import leakage_report

    sequences = evaluated.long_sequences("leakage")
    length = evaluated.length or 0
    last = measured_tokens(args, length)
    documents = [sequence.tokens for sequence in sequences]
    if len(documents) < 2:
        raise UserError(
            f"--task leakage compares documents, and only {len(documents)} has {length + 1} "
            "tokens: give a shorter --length or more --documents"
        )
    kept = _kept(evaluated, length, last)
    results = {
        name: _check(name, way, evaluated.batch, documents, last, kept)
        for name, way in evaluated.ways.items()
    }
    names = [sequence.name for sequence in sequences]
    report = leakage_report(results, last, names, evaluated.about("leakage"))
    publish_task(evaluated, report, lambda path, title: draw_leakage(results, path, title))


def _kept(evaluated: Evaluated, length: int, last: int) -> list[int]:
    """How much nearest context stays right: none, and as much as a window sees."""
    config = evaluated.model.config
    wanted = [0, *([config.model.window_size] if config.model.window_size else [])]
    # Two chunks at least, or there is nothing to shuffle.
    kept = [n for n in wanted if length - last - n > config.inner.chunk_size]
    if not kept:
        raise UserError(
            f"--length {length} leaves no two chunks of {config.inner.chunk_size} tokens before "
            f"the last {last} to shuffle: give a longer --length, or a smaller --last"
        )
    return kept


def _check(
    name: str, way: Way, batch: int | None, documents: "list[Tensor]", last: int, kept: list[int]
) -> "LeakageResults":
    from ttt_megatron.evaluation.leakage import (
        Reading,
        check_causality,
        check_content,
        check_isolation,
        probe_positions,
    )
    from ttt_megatron.evaluation.leakage_report import LeakageResults

    length, chunk = len(documents[0]) - 1, way.loaded.config.inner.chunk_size
    positions = probe_positions(length, chunk)
    tokens = length // 2
    passes = 1 + 2 * len(positions) + 3 + 3 * len(kept)
    with progress_bar(way_label(name), passes * len(documents)) as on_progress:
        reading = Reading(
            learner=way.loaded.learner,
            inner_steps=way.inner_steps,
            bos_id=way.loaded.tokenizer.bos_id,
            batch=way.batch(batch),
            on_progress=on_progress,
        )
        return LeakageResults(
            causality=check_causality(reading, documents, positions),
            isolation=check_isolation(reading, documents, tokens),
            content=[
                check_content(reading, documents, last=last, kept=n, chunk_size=chunk) for n in kept
            ],
        )
