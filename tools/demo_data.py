"""What the demo has to know of its prepared text.

`lengths FOLDER TOKENS` prints how to pack rows of so many tokens and how many to evaluate on,
`prompt FOLDER TOKENS` the text of so many first tokens of a held-out document.
"""

import argparse
import sys
from pathlib import Path

from ttt_megatron.data.dataset import open_dataset
from ttt_megatron.data.tokenizer import load_tokenizer
from ttt_megatron.data.validation import validation_sequences
from ttt_megatron.errors import UserError

# A mean over fewer documents than this says little.
_FEW_DOCUMENTS = 4


def choose_lengths(folder: Path, length: int) -> tuple[str, int]:
    """How to pack rows of `length` tokens, and how many tokens of held-out documents to read.

    Text whose documents are shorter is packed end to end and evaluated in whole documents (0).
    Raises UserError if the text is too little for one row.
    """
    train, validation = open_dataset(folder), open_dataset(folder, "validation")
    if train.num_tokens <= length:
        raise UserError(
            f"the text has {train.num_tokens:,} tokens for training, and the demo's second stage "
            f"reads {length:,} at once: give more text"
        )
    packing = "spans" if train.lengths.max() > length else "concatenate"
    enough = int((validation.lengths > length).sum()) >= _FEW_DOCUMENTS
    return packing, length if enough else 0


def held_out_text(folder: Path, count: int) -> str:
    """Text of the first `count` tokens of a held-out document, or of the longest one if all are
    shorter."""
    dataset = open_dataset(folder, "validation")
    length = min(count, int(dataset.lengths.max())) - 1
    tokens = validation_sequences(dataset, length, 1)[0].tokens
    # Token 0 is BOS, which is no text.
    return load_tokenizer(folder).decode(tokens[1:].numpy())


def main() -> int:
    """Prints what is asked for; 2 after an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("question", choices=("lengths", "prompt"))
    parser.add_argument("data", type=Path)
    parser.add_argument("tokens", type=int)
    args = parser.parse_args()
    try:
        if args.question == "lengths":
            print(*choose_lengths(args.data, args.tokens))
        else:
            sys.stdout.write(held_out_text(args.data, args.tokens))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
