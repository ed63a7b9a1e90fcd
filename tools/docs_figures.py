"""Draws the figures of docs/concepts.md; `python tools/docs_figures.py` writes docs/figures/."""

from pathlib import Path

from docs_drawing import Drawing

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
_WIDTH = 820


def sweeps() -> Drawing:
    """The forward and the reverse sweep over the chunks of a sequence, and what each carries."""
    d = Drawing(
        width=_WIDTH,
        height=484,
        title="The two sweeps over the chunks of a sequence",
        description=(
            "Forward, from left to right: each chunk is read with the fast weights that the chunk "
            "before left, gives its loss and its inner gradient, and one clipped step makes the "
            "next fast weights; keys and values go along. In reverse, from right to left: each "
            "chunk is run on pairs and hands the cotangents of fast weights and of keys and values "
            "to the chunk before, and the slow weights' gradients are summed."
        ),
    )
    lefts = (96, 296, 496)
    d.text(16, 28, "Forward sweep", bold=True, anchor="start")
    d.text(150, 28, "left to right: what is learnt is carried on", anchor="start", muted=True)
    for number, x in enumerate(lefts):
        index = str(number + 1)
        d.box(x, 64, 128, 58, f"chunk {index}", "1024 tokens", fill="forward")
        d.arrow(x + 64, 122, x + 64, 152)
        d.box(x + 20, 154, 88, 34, f"loss {index}", fill="plain")
    d.box(680, 64, 124, 58, "chunk 4", "no step follows", fill="forward")
    d.arrow(742, 122, 742, 152)
    d.box(698, 154, 88, 34, "loss 4", fill="plain")
    d.text(30, 86, f"W{_sub('0')}", bold=True)
    d.arrow(46, 82, 94, 82)
    for number, x in enumerate((224, 424, 624)):
        end = x + (70 if number < 2 else 54)
        d.arrow(x, 82, end, 82)
        d.text((x + end) / 2, 74, f"W{_sub(str(number + 1))}", bold=True, small=True)
        d.arrow(x, 108, end, 108, dashed=True)
        d.text((x + end) / 2, 123, "KV", small=True, muted=True)
    d.text(
        96,
        216,
        "After a chunk: g = ∂loss/∂W, clipped at norm c; W moves by η against it. Kept: g.",
        anchor="start",
    )
    d.line(16, 240, 804, 240)
    d.text(16, 272, "Reverse sweep", bold=True, anchor="start")
    d.text(
        150, 272, "right to left: what each step did to later losses", anchor="start", muted=True
    )
    for number, x in enumerate((*lefts, 680)):
        index = str(number + 1)
        d.box(x, 308, 128 if number < 3 else 124, 58, f"chunk {index}", "as pairs", fill="reverse")
        d.arrow(x + 64, 366, x + 64, 398)
    d.box(96, 400, 708, 34, "gradients of the slow weights, summed over chunks", fill="plain")
    for number, x in enumerate((224, 424, 624)):
        end = x + (70 if number < 2 else 54)
        d.arrow(end, 326, x + 2, 326)
        d.text((x + end) / 2, 318, f"∂W{_sub(str(number + 1))}", bold=True, small=True)
        d.arrow(end, 352, x + 2, 352, dashed=True)
        d.text((x + end) / 2, 367, "∂KV", small=True, muted=True)
    d.arrow(94, 326, 48, 326)
    d.text(28, 330, f"∂W{_sub('0')}", bold=True)
    d.text(
        96,
        462,
        "A pair is a value and its tangent, the direction in which W moves: first order alone.",
        anchor="start",
    )
    return d


def shards() -> Drawing:
    """A sequence cut over three ranks of a context-parallel group, and their messages."""
    d = Drawing(
        width=_WIDTH,
        height=442,
        title="Parts of a sequence on the ranks of a context-parallel group",
        description=(
            "Each rank holds a contiguous part of the sequence. In the prefix, keys and values of "
            "the window before a part come from the left neighbour. In the suffix, fast weights "
            "and keys and values go from rank to rank to the right, and their cotangents come "
            "back to the left."
        ),
    )
    lefts = (112, 360, 608)
    width = 148
    for number, x in enumerate(lefts):
        d.text(x + width / 2, 28, f"rank {number}", bold=True)
        d.box(x, 44, width, 34, f"tokens of part {number + 1}", fill="plain")
        d.arrow(x + width / 2, 78, x + width / 2, 106)
        d.box(x, 108, width, 82, "prefix", "all tokens at once", fill="forward")
        d.arrow(x + width / 2, 190, x + width / 2, 226)
        d.box(x, 228, width, 96, "suffix", "chunk by chunk,", "a step after each", fill="reverse")
    d.text(16, 64, "sequence", anchor="start", muted=True)
    d.text(16, 146, "three", anchor="start", muted=True)
    d.text(16, 164, "quarters of", anchor="start", muted=True)
    d.text(16, 182, "the blocks", anchor="start", muted=True)
    d.text(16, 272, "the last", anchor="start", muted=True)
    d.text(16, 290, "quarter", anchor="start", muted=True)
    for left in lefts[:-1]:
        start, end = left + width, left + 248
        middle = (start + end) / 2
        d.arrow(start, 132, end - 2, 132, dashed=True)
        d.text(middle, 124, "halo", small=True, bold=True)
        d.arrow(end, 170, start + 2, 170, dashed=True)
        d.text(middle, 162, "∂halo", small=True, bold=True)
        d.arrow(start, 256, end - 2, 256)
        d.text(middle, 248, "W, KV", small=True, bold=True)
        d.arrow(end, 302, start + 2, 302)
        d.text(middle, 294, "∂W, ∂KV", small=True, bold=True)
    d.line(16, 352, 804, 352)
    rows = (
        ("halo", "in every layer of the prefix: keys and values of the window before the part"),
        ("W, KV", "forward: fast weights, and keys and values of the suffix, relayed to the right"),
        ("∂ …", "backward: the cotangents of what came, to where it came from"),
    )
    for number, (name, words) in enumerate(rows):
        y = 380 + 22 * number
        d.text(112, y, name, bold=True, anchor="start")
        d.text(172, y, words, anchor="start")
    return d


def _sub(index: str) -> str:
    return index.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


FIGURES = {"sweeps.svg": sweeps, "shards.svg": shards}


def main() -> None:
    """Writes every figure beside its place, then renames it."""
    for name, draw in FIGURES.items():
        beside = FOLDER / f".{name}.tmp"
        beside.write_text(draw().svg(), encoding="utf-8")
        beside.replace(FOLDER / name)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
