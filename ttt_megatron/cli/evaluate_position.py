"""`evaluate --task position`: loss by token position."""

import argparse
import time
from typing import TYPE_CHECKING

from ttt_megatron.cli.evaluate_models import Evaluated
from ttt_megatron.cli.evaluate_output import progress_bar, publish, way_label

if TYPE_CHECKING:
    from ttt_megatron.data.validation import ValidationSequences
    from ttt_megatron.evaluation.by_position import PerTokenLosses
    from ttt_megatron.evaluation.report import PositionReport

OPTIONS: tuple[str, ...] = ()
STEM = "by_position"


def run(evaluated: Evaluated, args: argparse.Namespace) -> None:
    """Measures and publishes."""
    from ttt_megatron.evaluation.plot import draw_by_position

    report = _measure(evaluated, evaluated.sequences())
    window = evaluated.model.config.model.window_size
    publish(
        evaluated,
        report,
        tables=[report.table()],
        stem=STEM,
        metrics=report.metrics(),
        draw=lambda path, title: draw_by_position(report, path, title, window),
    )


def _measure(evaluated: Evaluated, sequences: "ValidationSequences") -> "PositionReport":
    from ttt_megatron.evaluation.by_position import evaluate_by_position
    from ttt_megatron.evaluation.report import PositionReport
    from ttt_megatron.evaluation.statistics import position_buckets, sum_buckets

    losses: dict[str, PerTokenLosses] = {}
    speed: dict[str, float] = {}
    for name, way in evaluated.ways.items():
        start = time.perf_counter()
        with progress_bar(way_label(name), len(sequences)) as on_progress:
            losses[name] = evaluate_by_position(
                way.loaded.learner,
                (sequence.tokens for sequence in sequences),
                inner_steps=way.inner_steps,
                batch=way.batch(evaluated.batch),
                bos_id=way.loaded.tokenizer.bos_id,
                on_progress=on_progress,
            )
        tokens = sum(map(len, losses[name].nll))
        speed[name] = round(tokens / (time.perf_counter() - start), 1)
    buckets = position_buckets(losses["off"].longest)
    decode = evaluated.model.tokenizer.decode
    texts = (decode(sequence.tokens[1:].numpy()) for sequence in sequences)
    return PositionReport(
        buckets=buckets,
        curves={name: sum_buckets(each, buckets) for name, each in losses.items()},
        documents=[sequence.name for sequence in sequences],
        document_bytes=[len(text.encode("utf-8")) for text in texts],
        about={**evaluated.about("position"), "tokens_per_second": speed},
    )
