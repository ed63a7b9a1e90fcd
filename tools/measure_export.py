"""An exported model beside the checkpoint it is of, on a held-out text.

    python tools/measure_export.py EXPORTED CHECKPOINT TEXT [--chunks 64] [--positions 1024 65536]

EXPORTED is what `ttt-megatron export CHECKPOINT EXPORTED` wrote. Reads the text's first chunks with
both and prints by how much logits and the nats of a token differ, read in chunks and in pieces that
are none; then the speed of reading with inner steps on and off, and the time of a decoded token
early and late in the text, taken in turns; then a row's memory and its file, and what keeping it
smaller costs. The text is repeated where it is too short for the positions.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_megatron.errors import UserError
from ttt_megatron.exchange.verify_export import load_exported_model
from ttt_megatron.serving.session import Session
from ttt_megatron.training.weights import load_learner

_ROUNDS = 5
_DECODED = 64


def read(model: Any, tokens: Tensor, size: int, **options: Any) -> tuple[Tensor, Any]:
    """Logits [1, n, V] and the cache of reading [1, n] in pieces of a size."""
    cache, logits = None, []
    for piece in tokens.split(size, dim=1):
        output = model(piece, cache=cache, **options)
        cache, options = output.cache, {k: v for k, v in options.items() if k != "ttt"}
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


def nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats of every token but the first: [n − 1] float64."""
    predicted = logits[0, :-1].double().log_softmax(-1)
    return -predicted.gather(-1, tokens[0, 1:, None]).squeeze(-1)


def compare(model: Any, checkpoint: Path, tokens: Tensor) -> None:
    """Prints the differences between export and checkpoint."""
    learner, _, _ = load_learner(checkpoint)
    session = Session(learner.eval(), bos_id=model.config.bos_token_id)
    expected = session.read(tokens)
    chunk = model.config.inner["chunk_size"]
    print(f"{tokens.shape[1]:,} tokens, {session.steps_taken} inner steps; against the checkpoint:")
    for title, size in (("at once", tokens.shape[1]), ("in pieces", max(1, int(0.7 * chunk)))):
        logits, _ = read(model, tokens, size)
        ours, theirs = nats(expected, tokens), nats(logits, tokens)
        print(
            f"  {title}: logits differ by at most {float((logits - expected).abs().max()):.1e} "
            f"(largest {float(expected.abs().max()):.3g}), nats of a token by at most "
            f"{float((ours - theirs).abs().max()):.1e}, their mean {float(theirs.mean()):.6f} and "
            f"{float(ours.mean()):.6f}"
        )


def reading_speed(model: Any, tokens: Tensor) -> None:
    """Prints tokens a second with inner steps on and off, medians of rounds taken in turns."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(_ROUNDS):
        for ttt, taken in seconds.items():
            start = time.perf_counter()
            read(model, tokens, tokens.shape[1], ttt=ttt, logits_to_keep=1)
            taken.append(time.perf_counter() - start)
    rates = {ttt: tokens.shape[1] / statistics.median(taken) for ttt, taken in seconds.items()}
    ratios = [on / off for on, off in zip(*seconds.values(), strict=True)]
    print(
        f"reading {tokens.shape[1]:,} tokens: {rates[True]:,.0f} tokens/s with inner steps, "
        f"{rates[False]:,.0f} without; {statistics.median(ratios):.2f} times the time"
    )


def decoding(model: Any, tokens: Tensor, positions: list[int]) -> list[Any]:
    """Prints milliseconds a decoded token at the positions, in turns; returns the caches there."""
    caches: list[Any] = []
    cache: Any = None
    done = 0
    for position in positions:
        for piece in tokens[:, done:position].split(4096, dim=1):
            cache = model(piece, cache=cache, logits_to_keep=1).cache
        done = position
        caches.append(cache.clone())
    taken: list[list[float]] = [[] for _ in positions]
    for _ in range(_ROUNDS):
        running = [cache.clone() for cache in caches]
        for step in range(_DECODED):
            for row, own in enumerate(running):
                start = time.perf_counter()
                model(tokens[:, step : step + 1], cache=own, logits_to_keep=1)
                taken[row].append(time.perf_counter() - start)
    for position, times in zip(positions, taken, strict=True):
        mean = 1e3 * statistics.mean(times)
        print(
            f"decoding at {position:,}: {1e3 * statistics.median(times):.3f} ms a token (median), "
            f"{mean:.3f} ms with the inner steps in it (mean)"
        )
    return caches


def states(model: Any, cache: Any, tokens: Tensor) -> None:
    """Prints a row's memory and file, and what smaller files change in the next chunk's loss."""
    print(f"a row holds {cache.nbytes:,} bytes in memory")
    before = model(tokens, cache=cache.clone()).logits
    with tempfile.TemporaryDirectory() as folder:
        for change in ("exact", "bf16", "rank:16", "rank:4"):
            path = Path(folder) / "row.state"
            info = cache.save(path, model, change=change)
            loaded = type(cache).load(path, model)
            after = model(tokens, cache=loaded).logits
            lost = float((nats(after, tokens) - nats(before, tokens)).mean())
            print(
                f"  {change}: {info['bytes']:,} bytes, error of the change {info['error']:.3f}, "
                f"logits differ by at most {float((after - before).abs().max()):.1e}, "
                f"{lost:+.5f} nats a token over the next {tokens.shape[1]:,}"
            )


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exported", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--positions", type=int, nargs=2, default=[1024, 65536])
    options = parser.parse_args(argv)
    from transformers import AutoTokenizer

    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {options.text} cannot be read ({error}): give a text", file=sys.stderr)
        return 2
    try:
        model = load_exported_model(options.exported, torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.exported, trust_remote_code=True)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        furthest = options.positions[1] + 4 * model.config.inner["chunk_size"]
        ids = ids.repeat(1, -(-furthest // ids.shape[1])) if ids.shape[1] < furthest else ids
        chunk = model.config.inner["chunk_size"]
        compare(model, options.checkpoint, ids[:, : options.chunks * chunk + 1])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reading_speed(model, ids[:, : options.chunks * chunk])
    caches = decoding(model, ids, options.positions)
    states(model, caches[-1], ids[:, options.positions[1] :][:, : 4 * chunk])
    return 0


if __name__ == "__main__":
    sys.exit(main())
