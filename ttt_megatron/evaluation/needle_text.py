"""What is hidden, how it is said and how it is asked for: S-NIAH in RULER's form.

RULER (arXiv 2404.06654) hides one sentence that gives a value for a key, and asks for the value:
S-NIAH-1 in a few sentences repeated over and over, S-NIAH-2 in running text, both with a number of
seven digits; S-NIAH-3 in running text with a UUID. The wording here is this project's own.
"""

import random
import uuid
from dataclasses import dataclass

# Words of one length, so that prompts without a haystack are equally long in bytes.
ADJECTIVES = """amber brave brisk civic crisp dusty early empty faint fancy fresh grand green happy
heavy ivory jolly large lucky minor misty noble polar proud quick quiet rapid royal rusty sharp
shiny silky sleek small solid stern sunny sweet tidal urban vivid windy"""
NOUNS = """anvil apple arrow basin beach berry bison brick cabin cable canoe cedar chair cliff
cloud clock coral crane crown drums eagle ferry field flame flute forge glove grape heron horse
house knoll ladle lemon lodge manor maple medal ocean olive onion otter panda pearl piano plaza
raven river robin sable scarf shelf spoon stone table tiger torch tower train tulip wheel"""

NOISE = (
    "The lake is calm.",
    "The path is narrow.",
    "The bread is warm.",
    "We walk on.",
    "Up the hill and down.",
)
"""Sentences whose repetition is the haystack of S-NIAH-1."""


@dataclass(frozen=True, kw_only=True)
class NeedleKind:
    """One of the three tasks: `essay` says what the haystack is, `thing` what is hidden."""

    number: int
    essay: bool
    thing: str

    @property
    def name(self) -> str:
        """As RULER calls it."""
        return f"S-NIAH-{self.number}"

    def draw_value(self, generator: random.Random) -> str:
        """Seven digits, or a UUID."""
        if self.thing == "UUID":
            return str(uuid.UUID(int=generator.getrandbits(128), version=4))
        return str(generator.randint(1_000_000, 9_999_999))


KINDS = {
    1: NeedleKind(number=1, essay=False, thing="number"),
    2: NeedleKind(number=2, essay=True, thing="number"),
    3: NeedleKind(number=3, essay=True, thing="UUID"),
}


def draw_key(generator: random.Random) -> str:
    """Two words, such as `quiet-otter`."""
    return f"{generator.choice(ADJECTIVES.split())}-{generator.choice(NOUNS.split())}"


def introduction(kind: NeedleKind) -> str:
    """What stands before the haystack."""
    return (
        f"A secret {kind.thing} is hidden in the following text. Keep it in mind; it will be asked "
        "for afterwards.\n"
    )


def statement(kind: NeedleKind, key: str, value: str) -> str:
    """The needle, as a sentence between two others."""
    return f" The secret {kind.thing} of {key} is: {value}."


def question(kind: NeedleKind, key: str) -> str:
    """What stands behind the haystack, and how the answer begins; the value is next."""
    return (
        f"\nWhat is the secret {kind.thing} of {key} that the text mentions? "
        f"The secret {kind.thing} of {key} is:"
    )


def answer(value: str) -> str:
    """What the right continuation begins with."""
    return f" {value}"


def is_found(value: str, continuation: str) -> bool:
    """RULER's rule: the value occurs in what was generated, upper or lower case."""
    return value.lower() in continuation.lower()
