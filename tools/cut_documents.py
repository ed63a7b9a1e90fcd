"""Cut documents of JSON lines into pieces of equal length, so that more of them are measured.

python tools/cut_documents.py held-out.jsonl.gz --characters 20000 --pieces 8 --output pieces.jsonl
"""

import argparse
import gzip
import json
import sys
from pathlib import Path


def cut(text: str, characters: int, pieces: int) -> list[str]:
    """Up to `pieces` pieces of `characters` each, spread evenly over the text."""
    count = min(pieces, len(text) // characters)
    starts = [round(index * len(text) / count) for index in range(count)]
    return [text[start : start + characters] for start in starts]


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for input without a single piece."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("--characters", type=int, default=20_000)
    parser.add_argument("--pieces", type=int, default=8, help="of one document, at most")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    opened = gzip.open if args.input.suffix == ".gz" else open
    with opened(args.input, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    found = [piece for text in texts for piece in cut(text, args.characters, args.pieces)]
    if not found:
        print(
            f"{args.input}: none of {len(texts)} documents has {args.characters:,} characters; "
            "give fewer --characters",
            file=sys.stderr,
        )
        return 2
    with args.output.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": piece}) + "\n" for piece in found)
    print(f"{len(found)} pieces of {len(texts)} documents in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
