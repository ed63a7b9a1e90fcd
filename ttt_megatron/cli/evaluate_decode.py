"""`evaluate --task decode`: decoded text under another model."""

import argparse

from ttt_megatron.cli.evaluate_models import Evaluated, same_tokenizer, takes_inner_steps
from ttt_megatron.cli.evaluate_output import progress_bar, publish_task, way_label
from ttt_megatron.cli.loaded_model import load_model
from ttt_megatron.errors import UserError

OPTIONS = ("judge", "prefill", "decode")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the task's own options."""
    add = group.add_argument
    add("--judge", metavar="MODEL", help="whose loss of the decoded text is measured")
    add("--prefill", type=int, metavar="N", help="tokens read first (default: half of --length)")
    add("--decode", type=int, metavar="N", help="tokens decoded (default: as many as are read)")


def check(args: argparse.Namespace) -> None:
    """Raises UserError, before anything is loaded, if there is no judge."""
    if args.judge is None:
        raise UserError(
            "--task decode measures decoded text by another model's loss: give one with --judge"
        )


def run(evaluated: Evaluated, args: argparse.Namespace) -> None:
    """Decodes, has it judged, and publishes."""
    import torch

    from ttt_megatron.evaluation.decoding import HELD_OUT, Judge, decode, decoding_report
    from ttt_megatron.evaluation.decoding_plot import draw_decoding

    sequences = evaluated.long_sequences("decode")
    length = evaluated.length or 0
    prefill, count = _cut(args, length)
    loaded = load_model(args.judge, args.device)
    judge = Judge(
        learner=loaded.learner,
        tokenizer=loaded.tokenizer,
        inner_steps=takes_inner_steps(loaded),
        batch=evaluated.batch or loaded.config.training.micro_batch_size,
    )
    tokenizer = evaluated.model.tokenizer
    other = not same_tokenizer(tokenizer, loaded.tokenizer)
    documents = torch.stack([sequence.tokens for sequence in sequences])
    prompts = documents[:, :prefill]
    decoded = {}
    for name, way in evaluated.ways.items():
        with progress_bar(f"decoding, {way_label(name)}", len(documents)) as on_progress:
            decoded[name] = decode(
                way.loaded.learner,
                tokenizer,
                prompts,
                count,
                inner_steps=way.inner_steps,
                batch=way.batch(evaluated.batch),
                seed=args.seed,
                on_progress=on_progress,
            )
    decoded[HELD_OUT] = documents[:, prefill : prefill + count]
    judgements = {}
    for name, tokens in decoded.items():
        with progress_bar(f"judging, {way_label(name)}", len(documents)) as on_progress:
            judgements[name] = judge.judge(
                prompts, tokens, tokenizer, retokenize=other, on_progress=on_progress
            )
    report = decoding_report(
        judgements,
        [sequence.name for sequence in sequences],
        prefill=prefill,
        decoded=count,
        by_byte=other,
        about={**evaluated.about("decode"), "judge": str(loaded.checkpoint), "seed": args.seed},
    )
    publish_task(
        evaluated, report, lambda path, title: draw_decoding(judgements, path, title, other)
    )


def _cut(args: argparse.Namespace, length: int) -> tuple[int, int]:
    """Tokens read and tokens decoded; together they are held-out text's, for comparison."""
    prefill = length // 2 if args.prefill is None else args.prefill
    count = min(prefill, length - prefill) if args.decode is None else args.decode
    for name, value in (("prefill", prefill), ("decode", count)):
        if value < 1:
            raise UserError(f"--{name} {value}: give 1 token or more")
    if prefill + count > length:
        raise UserError(
            f"--prefill {prefill} and --decode {count} are more than the --length {length} tokens "
            "of each document, whose own continuation is judged too: give a longer --length"
        )
    return prefill, count
