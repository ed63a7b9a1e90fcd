"""The references of keys and of commands, as Markdown, from the schema and the parsers."""

import importlib
import re
from argparse import ArgumentParser, HelpFormatter
from itertools import groupby

from ttt_megatron.cli.main import COMMANDS, command_parser
from ttt_megatron.config.reference import KeyReference, key_references

_COLUMNS = 96
_NO_SECTION = "general"


def key_reference() -> str:
    """Every key of a recipe, a section a heading, in the schema's order."""
    return "\n".join(
        f"## {section or _NO_SECTION}\n\n{_table(list(keys))}"
        for section, keys in groupby(key_references(), key=_section)
    )


def _section(key: KeyReference) -> str:
    return key.name.rpartition(".")[0]


def _table(keys: list[KeyReference]) -> str:
    rows = ["| key | default | value | meaning |", "|---|---|---|---|"]
    rows += [
        f'| <span id="{key.name}"></span>`{key.name.rpartition(".")[2]}` | `{key.default}` '
        f"| {_cell(key.type)} | {_cell(key.help)} |"
        for key in keys
    ]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def command_reference() -> str:
    """Every command: what it does, its arguments as `--help` prints them, its examples."""
    rows = ["| command | |", "|---|---|"]
    rows += [f"| [{name}](#{name}) | {_cell(text)} |" for name, (_, text) in COMMANDS.items()]
    return "\n\n".join(["\n".join(rows), *map(_command, COMMANDS)]) + "\n"


def _command(name: str) -> str:
    module = importlib.import_module(COMMANDS[name][0])
    parser = command_parser(name, module)
    parts = [f"## {name}", _sentence(module.HELP), _block(_arguments(parser))]
    parts += [_paragraph(text) for text in _paragraphs(module.EPILOG)]
    return "\n\n".join(parts)


def _sentence(text: str) -> str:
    return _plain(text[:1].upper() + text[1:].rstrip(".")) + "."


def _arguments(parser: ArgumentParser) -> str:
    """The help without description and epilog, as wide on every machine."""
    parser.description = parser.epilog = None
    parser.formatter_class = lambda *, prog: HelpFormatter(prog, width=_COLUMNS)
    return parser.format_help().strip()


def _paragraphs(epilog: str) -> list[str]:
    """Parts of the epilog: those that a blank line parts, unless code goes on behind it."""
    parts: list[str] = []
    for text in epilog.strip("\n").split("\n\n"):
        if parts and text.startswith("  "):
            parts[-1] += "\n\n" + text
        else:
            parts.append(text)
    return parts


def _paragraph(text: str) -> str:
    head, _, rest = text.partition("\n")
    if not rest.startswith("  "):
        return _plain(text)
    code = "\n".join(line.removeprefix("  ") for line in rest.split("\n"))
    return f"{head.capitalize()}\n\n{_block(code)}"


def _block(text: str) -> str:
    # Examples have words behind them, which no shell's colours suit.
    return f"```text\n{text}\n```"


def _plain(text: str) -> str:
    """`text` so that Markdown reads it as it stands; code in backticks, and pages as links."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"\bdocs/([a-z0-9-]+\.md)", r"[\1](\1)", re.sub(r"([\\*_<\[\]])", r"\\\1", part))
        for part in parts[::2]
    ]
    return "".join(parts)
