"""`evaluate --task needle`: needles in haystacks, S-NIAH-1 to 3 in RULER's form."""

import argparse

from ttt_megatron.cli.evaluate_models import Evaluated
from ttt_megatron.cli.evaluate_output import progress_bar, publish_task, way_label
from ttt_megatron.cli.number_lists import whole_numbers

OPTIONS = ("needles", "lengths", "depths", "samples", "score", "answers", "answer_tokens")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the task's own options."""
    add = group.add_argument
    add("--needles", metavar="N,N,...", help="which of S-NIAH-1, 2, 3 (default: 1,2,3)")
    add("--lengths", metavar="N,N,...", help="tokens of a prompt (default: --length)")
    add(
        "--depths",
        metavar="N,N,...",
        help="percentages of the haystack before the needle (default: 0,25,50,75,100)",
    )
    add("--samples", type=int, metavar="N", help="prompts of each kind and place (default: 10)")
    add(
        "--score",
        choices=["exact", "choice"],
        help="exact: greedy decoding gives the value; choice: the value is the likeliest of "
        "--answers, for models too small to answer (default: exact)",
    )
    add("--answers", type=int, metavar="K", help="values to choose from (default: 10)")
    add(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="tokens decoded in search of the value (default: 128)",
    )


def run(evaluated: Evaluated, args: argparse.Namespace) -> None:
    """Measures and publishes."""
    from ttt_megatron.evaluation.attention_reach import attention_reach
    from ttt_megatron.evaluation.needle import NeedleSettings, measure_needles
    from ttt_megatron.evaluation.needle_plot import draw_needles
    from ttt_megatron.evaluation.needle_prompt import PromptBuilder
    from ttt_megatron.evaluation.needle_report import NeedleResults, needle_report
    from ttt_megatron.evaluation.needle_scores import Answerer

    length = evaluated.length or evaluated.model.config.data.sequence_length
    given = {
        "kinds": tuple(whole_numbers(args.needles, "needles")),
        "depths": tuple(x / 100 for x in whole_numbers(args.depths, "depths")),
        **{name: getattr(args, name) for name in OPTIONS[3:]},
    }
    settings = NeedleSettings(
        lengths=tuple(whole_numbers(args.lengths, "lengths") or [length]),
        seed=args.seed,
        **{name: value for name, value in given.items() if value not in (None, ())},
    )
    tokenizer = evaluated.model.tokenizer
    builder = PromptBuilder(
        tokenizer, evaluated.dataset, answers=settings.answers, seed=settings.seed
    )
    results = {}
    for name, way in evaluated.ways.items():
        answerer = Answerer(
            learner=way.loaded.learner, tokenizer=tokenizer, inner_steps=way.inner_steps
        )
        with progress_bar(way_label(name), settings.prompts, "prompts") as on_progress:
            cells = measure_needles(
                answerer,
                builder,
                settings,
                batch=way.batch(evaluated.batch),
                on_progress=on_progress,
            )
        reach = attention_reach(way.loaded.config.model)
        results[name] = NeedleResults(cells=cells, reach=reach)
    report = needle_report(results, settings, evaluated.about("needle"))
    publish_task(
        evaluated, report, lambda path, title: draw_needles(results, settings, path, title)
    )
