"""The documentation: every page in the menu, every key and command in its reference."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_figures import FIGURES
from docs_links import LinkSite
from docs_reference import command_reference, key_reference

from ttt_megatron.cli.main import COMMANDS
from ttt_megatron.config.keys import known_keys

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


class SettingsLoader(yaml.SafeLoader):
    """Reads mkdocs.yml: what only MkDocs understands is read as nothing."""


SettingsLoader.add_multi_constructor("", lambda loader, suffix, node: None)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), SettingsLoader)
    return loaded


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in inner for page in pages_of(entry)]


def test_every_page_is_once_in_the_menu(settings: dict[str, Any]) -> None:
    listed = pages_of(settings["nav"])
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    there |= set(settings["extra"]["further_pages"].values())
    assert len(listed) == len(set(listed))
    assert set(listed) == there
    for source in settings["extra"]["further_pages"]:
        assert (ROOT / source).is_file()


def test_every_key_is_in_the_reference_with_its_section_default_and_help() -> None:
    text = key_reference()
    for name, key in known_keys().items():
        row = next(line for line in text.splitlines() if f'id="{name}"' in line)
        assert key.expected in row.replace("\\", "")
        assert key.help.replace("|", "\\|") in re.sub(r"\\(?!\|)", "", row)
        section = name.rpartition(".")[0] or "general"
        before = text[: text.index(f'id="{name}"')]
        assert re.findall(r"^## (.*)$", before, re.MULTILINE)[-1] == section


def test_every_command_is_in_the_reference_with_its_options_and_examples() -> None:
    text = command_reference()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == list(COMMANDS)
    for name in COMMANDS:
        part = text[text.index(f"\n## {name}\n") :].split("\n## ")[1]
        assert f"usage: ttt-megatron {name}" in part
        assert "Examples:" in part
        assert f"ttt-megatron {name}" in part.split("Examples:")[1]


def test_pages_ask_for_what_is_generated() -> None:
    # As in tools/docs_hooks.py, which needs MkDocs to be imported.
    marks = re.findall(r'"(<!-- .* -->)"', (ROOT / "tools/docs_hooks.py").read_text())
    assert len(marks) == 2
    for mark, page in zip(marks, ("configuration.md", "commands.md"), strict=True):
        assert (DOCS / page).read_text().count(f"\n{mark}\n") == 1


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_what_the_script_draws(name: str) -> None:
    assert (DOCS / "figures" / name).read_text() == FIGURES[name]().svg()
    assert f"(figures/{name})" in (DOCS / "concepts.md").read_text()


@pytest.mark.parametrize(
    ("source", "markdown", "expected"),
    [
        ("docs/a.md", "[x](cluster.md#profiles)", "[x](cluster.md#profiles)"),
        ("docs/a.md", "[x](../recipes/README.md)", "[x](recipes.md)"),
        ("docs/api/a.md", "[x](../cluster.md)", "[x](../cluster.md)"),
        ("docs/a.md", "[cluster.md](cluster.md)", "[On a cluster](cluster.md)"),
        (
            "recipes/README.md",
            "[docs/memory.md](../docs/memory.md)",
            "[Memory of a meta step](memory.md)",
        ),
        ("docs/a.md", "[x](../tools/demo.sh)", "[x](https://host/r/blob/main/tools/demo.sh)"),
        ("docs/a.md", "[x](benchmarks/h200)", "[x](https://host/r/tree/main/docs/benchmarks/h200)"),
        (
            "docs/a.md",
            "`[x](../no)` and [y](https://other/)",
            "`[x](../no)` and [y](https://other/)",
        ),
        ("docs/a.md", "```\n[x](../no)\n```", "```\n[x](../no)\n```"),
    ],
)
def test_links(source: str, markdown: str, expected: str) -> None:
    site = LinkSite(
        root=ROOT, repository="https://host/r/", pages={"recipes/README.md": "recipes.md"}
    )
    assert site.rewrite(markdown, source) == (expected, [])


def test_links_to_sources_need_an_address_and_a_file() -> None:
    site = LinkSite(root=ROOT)
    assert site.rewrite("see [the demo](../tools/demo.sh)", "docs/a.md") == ("see the demo", [])
    assert site.rewrite("[x](../tools/none.sh)", "docs/a.md")[1] == ["../tools/none.sh"]
