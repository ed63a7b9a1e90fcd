"""Boxes, arrows and words as SVG that reads the same on light and dark pages."""

from dataclasses import dataclass, field
from html import escape

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_INK, _MUTED, _PAPER = "#1f2937", "#5b6472", "#ffffff"
_FILLS = {
    "plain": ("#f3f4f6", "#9aa3af"),
    "forward": ("#dbe7fb", "#3b6fc4"),
    "reverse": ("#fbe6d2", "#c2691c"),
}
_SIZE, _SMALL = 14, 12


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure of `width` x `height` pixels; parts are drawn in the order they are added.

    Title and description are what a screen reader says. The paper is part of the drawing, so that
    dark pages show dark ink on white.
    """

    width: int
    height: int
    title: str
    description: str
    _parts: list[str] = field(default_factory=list, init=False, repr=False)

    def box(self, x: float, y: float, width: float, height: float, *lines: str, fill: str) -> None:
        """A rounded box with lines of text in its middle, the first one bold."""
        inside, edge = _FILLS[fill]
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{inside}" '
            f'stroke="{edge}" stroke-width="1.5"/>'
        )
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            first = number == 0
            self.text(
                x + width / 2,
                top + 18 * number,
                line,
                bold=first and len(lines) > 1,
                small=not first,
            )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        bold: bool = False,
        small: bool = False,
        muted: bool = False,
        anchor: str = "middle",
    ) -> None:
        """One line of text whose base line is at y."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{_SMALL if small else _SIZE}"'
            f' fill="{_MUTED if muted else _INK}"{weight}>{escape(words)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> None:
        """An arrow from the first point to the second."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{_INK}" stroke-width="1.5" '
            f'marker-end="url(#head)"{dash}/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A thin line that parts what is above from what is below."""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#d1d5db" stroke-width="1"/>'
        )

    def svg(self) -> str:
        """The whole file."""
        parts = "\n".join(self._parts)
        size = (
            f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        )
        return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{_FONT}">
<title>{escape(self.title)}</title>
<desc>{escape(self.description)}</desc>
<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" \
orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{_INK}"/></marker></defs>
<rect width="{self.width}" height="{self.height}" rx="8" fill="{_PAPER}"/>
{parts}
</svg>
"""
