"""Text for tests."""

import random

_SYLLABLES = (
    "sea",
    "wha",
    "le",
    "har",
    "poon",
    "ß",
    "鯨",
    "🐋",
    "cap",
    "tain",
    "night",
    "\n\n",
    "12",
    "--",
)


def make_text(seed: int, words: int) -> str:
    """Text whose UTF-8 has characters of one to four bytes."""
    generator = random.Random(seed)
    return " ".join(
        "".join(generator.choices(_SYLLABLES, k=generator.randint(1, 3))) for _ in range(words)
    )
