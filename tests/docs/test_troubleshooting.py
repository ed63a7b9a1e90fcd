"""The messages that docs/troubleshooting.md lists are those of the program."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
_FORMAT = re.compile(r"%[-0-9.]*[sdfge]")
_VARIABLE = re.compile(r"\$\{?\w+\}?")


def templates() -> Iterator[str]:
    """Texts of the program, `…` standing for what is put in."""
    for path in (ROOT / "ttt_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield _FORMAT.sub("…", node.value)
    for path in (ROOT / "slurm").rglob("*.j2"):
        yield _VARIABLE.sub("…", path.read_text().replace("\\\n", ""))


def listed_messages() -> list[str]:
    """Messages in the first column of the tables whose first column is called so."""
    messages, wanted = [], False
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            wanted = False
            continue
        first = line.split("|")[1].strip()
        wanted = wanted or first.startswith("message")
        if wanted and "(torch's)" not in first:
            spans = re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", first)
            messages += [text.strip() for _, text in spans if " " in text]
    return messages


def is_of(texts: list[str], message: str) -> bool:
    """Whether one of the texts has the message's parts, in their order and in one line."""
    parts = message.strip("…").split("…")
    longest = max(parts, key=len)
    pattern = re.compile("[^\n]*".join(map(re.escape, parts)))
    return any(longest in text and pattern.search(text) for text in texts)


def test_messages_are_those_of_the_program() -> None:
    messages = listed_messages()
    assert len(messages) > 60
    texts = [text for text in templates() if " " in text]
    assert [message for message in messages if not is_of(texts, message)] == []


def test_the_symptoms_of_the_page_have_messages_causes_and_next_steps() -> None:
    for part in PAGE.read_text().split("\n## ")[1:]:
        rows = [line for line in part.splitlines() if line.startswith("|")][2:]
        assert rows, part.splitlines()[0]
        for row in rows:
            cells = re.split(r"(?<!\\)\|", row)[1:-1]
            assert len(cells) == 3
            assert cells[0].strip()
            assert cells[2].strip()
