"""Links of the documentation that work in the repository and on the site.

Pages link by relative paths, as a repository host shows them. On the site a path into `docs/`
stays; one to a file outside, or to a folder, becomes an address in the repository, or plain text
where the repository's address is not set.
"""

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DOCS = "docs"
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")
# Code is left as it is: fenced blocks, lines indented as code, and spans between backticks.
_CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|^ {4}[^\n]*$|(`+)(?!`).*?(?<!`)\2(?!`)", re.M | re.S)
_FILE_NAME = re.compile(r"[\w./-]+\.md")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class LinkSite:
    """Where links lead: the checkout's `root`, the `repository` and its `branch`.

    `pages` are files outside docs/ that the site has as pages, by their paths from the root.
    """

    root: Path
    repository: str = ""
    branch: str = "main"
    pages: Mapping[str, str] = field(default_factory=dict)

    def rewrite(self, markdown: str, source: str) -> tuple[str, list[str]]:
        """`markdown` of the file `source` (a path from the root) as the site needs it.

        Also returns the targets outside docs/ that are not there, as they are written.
        """
        missing: list[str] = []

        def replaced(match: re.Match[str]) -> str:
            target = match["target"]
            if _ELSEWHERE.match(target):
                return match[0]
            path, _, anchor = target.partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
            if not (self.root / path).exists() and not path.startswith(DOCS + "/"):
                missing.append(target)
            return self._link(match["text"], path, anchor, source)

        parts, end = [], 0
        for code in _CODE.finditer(markdown):
            parts += [_LINK.sub(replaced, markdown[end : code.start()]), code[0]]
            end = code.end()
        parts.append(_LINK.sub(replaced, markdown[end:]))
        return "".join(parts), missing

    def _link(self, text: str, path: str, anchor: str, source: str) -> str:
        fragment = f"#{anchor}" if anchor else ""
        inside = path.startswith(DOCS + "/") and not (self.root / path).is_dir()
        page = path.removeprefix(DOCS + "/") if inside else self.pages.get(path)
        if page is not None:
            text = self._title(path) if _FILE_NAME.fullmatch(text) else text
            here = posixpath.dirname(self.page_of(source))
            return f"[{text}]({posixpath.relpath(page, here or '.')}{fragment})"
        if not self.repository:
            return text
        kind = "tree" if (self.root / path).is_dir() else "blob"
        return f"[{text}]({self.repository.rstrip('/')}/{kind}/{self.branch}/{path}{fragment})"

    def _title(self, path: str) -> str:
        """The first heading of a page, which says more than a file's name."""
        file = self.root / path
        first = file.read_text(encoding="utf-8").partition("\n")[0] if file.is_file() else ""
        return first.removeprefix("# ") if first.startswith("# ") else posixpath.basename(path)

    def page_of(self, source: str) -> str:
        """The page, by its path on the site, that shows the file `source` of the checkout."""
        return self.pages.get(source, source.removeprefix(DOCS + "/"))
