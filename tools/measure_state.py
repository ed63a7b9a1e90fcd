"""What lossy states cost: the loss of a document's continuation after each way of saving.

    python tools/measure_state.py runs/quickstart book.txt
    python tools/measure_state.py runs/quickstart book.txt --read 16384 --next 1024 --change rank:4

Reads the beginning of a document, saves it in every way, loads it and reads on. `forgotten` goes
on with the initial fast weights and the same keys and values.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ttt_megatron.cli.loaded_model import load_model
from ttt_megatron.cli.reading import read_text
from ttt_megatron.errors import UserError
from ttt_megatron.hf.state_ttt_e2e import StateError
from ttt_megatron.serving.session import Session

CHANGES = ("exact", "bf16", "rank:32", "rank:16", "rank:8", "rank:4", "rank:2", "rank:1")


def loss_of(session: Session, tokens: Tensor) -> float:
    """Mean loss in nats of predicting [1, n] tokens, inner steps going on."""
    logits = torch.cat((session.next_logits.unsqueeze(1), session.read(tokens)[:, :-1]), dim=1)
    return float(torch.nn.functional.cross_entropy(logits[0].double(), tokens[0]))


def measure(session: Session, rest: Tensor, changes: list[str]) -> None:
    """Prints a row for every way of saving what the session has read."""
    print(f"read {session.position:,} tokens; loss of the next {rest.shape[1]:,}:")
    print("| fast weights | file, kB | off by, of their change | loss |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        for change in changes:
            saved = session.save(path, change=change)
            again = session.clone()
            again.load(path)
            size, error = int(saved["bytes"]) / 1e3, float(saved["error"])
            print(f"| {change} | {size:,.0f} | {error:.2%} | {loss_of(again, rest):.4f} |")
    forgotten, fresh = session.clone(), session.clone()
    fresh.reset()
    state = session.state()
    state.fast = [w[0] for w in fresh.fast_weights]
    forgotten.restore([state])
    print(f"| forgotten | | 100% | {loss_of(forgotten, rest):.4f} |")


def main() -> int:
    """Reads the document and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="as `ttt-megatron generate` takes it")
    add("document", help="file of UTF-8 text")
    add("--read", type=int, default=8192, metavar="N", help="tokens read (default: %(default)s)")
    add("--next", type=int, default=1024, metavar="N", help="after those (default: %(default)s)")
    add("--change", action="append", metavar="KIND", help="instead of all ways of saving")
    args = parser.parse_args()
    try:
        loaded = load_model(args.model, "cpu")
        ids = loaded.tokenizer.encode_document(read_text(args.document, "document"))
        if len(ids) < args.read + args.next:
            raise UserError(f"{args.document} has {len(ids):,} tokens: lower --read or --next")
        tokens = torch.from_numpy(ids[: args.read + args.next]).unsqueeze(0)
        session = Session(loaded.learner, bos_id=loaded.tokenizer.bos_id)
        session.prefill(tokens[:, : args.read])
        measure(session, tokens[:, args.read :], args.change or list(CHANGES))
    except (UserError, StateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
