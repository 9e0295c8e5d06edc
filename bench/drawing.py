"""A page of text, boxes and lines as SVG: what `picture.py` draws with.

Colours are named by what they mean and follow the reader's light or dark mode, on a paper of its
own, so that it can be read on a page of either.
"""

from dataclasses import dataclass, field
from html import escape
from typing import Final

_STYLE: Final = """
  svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
        --better: #1a7f37; --even: #8c959f; --worse: #bc4c00; --mark: #0969da; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --ink: #f0f6fc; --soft: #9198a1; --line: #30363d;
          --better: #3fb950; --even: #7d8590; --worse: #f0883e; --mark: #58a6ff; }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
         fill: var(--ink); }
  .title { font-size: 21px; font-weight: 600; }
  .head { font-size: 14px; font-weight: 600; }
  .soft { fill: var(--soft); font-size: 12px; }
  .number { font-variant-numeric: tabular-nums; }
  .large { font-size: 22px; font-weight: 600; }
  .paper { fill: var(--paper); stroke: var(--line); }
  .line { stroke: var(--line); } .one { stroke: var(--soft); stroke-width: 1.5; }
  .better { fill: var(--better); } .even { fill: var(--even); } .worse { fill: var(--worse); }
  .mark { fill: var(--paper); stroke: var(--mark); stroke-width: 2; }
  .cut { fill: none; stroke: var(--paper); stroke-width: 2.5; }
  .tile { fill: none; stroke: var(--line); }
"""


@dataclass(slots=True)
class Canvas:
    """Elements so far, on a page of a width; `y` is how far down they reach."""

    width: int
    y: float = 0.0
    elements: list[str] = field(default_factory=list)

    def text(self, x: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Write at the present height."""
        named = f' class="{kind}"' if kind else ""
        where = f'x="{x:g}" y="{self.y:g}" text-anchor="{anchor}"'
        self.elements.append(f"<text{named} {where}>{escape(words)}</text>")

    def line(self, x: float, top: float, bottom: float, kind: str = "line") -> None:
        """Draw a line downwards."""
        ends = f'x1="{x:g}" x2="{x:g}" y1="{top:g}" y2="{bottom:g}"'
        self.elements.append(f'<line class="{kind}" {ends}/>')

    def box(
        self, kind: str, x: float, y: float, width: float, height: float, *, rounded: float = 0
    ) -> None:
        """Draw a rectangle from its upper left corner."""
        where = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        corners = f' rx="{rounded:g}"' if rounded else ""
        self.elements.append(f'<rect class="{kind}" {where}{corners}/>')

    def diamond(self, x: float, y: float) -> None:
        """Mark a place."""
        self.elements.append(f'<path class="mark" d="M{x:g} {y - 6:g}l5 6l-5 6l-5 -6z"/>')

    def chevron(self, x: float, y: float, *, left: bool) -> None:
        """Cut a box that ends here in paper's colour: it would go on."""
        step = 5 if left else -5
        path = f"M{x + 2 * step:g} {y - 7:g}l{-step} 7l{step} 7"
        self.elements.append(f'<path class="cut" d="{path}"/>')

    def svg(self, title: str, description: str, *, margin: int) -> str:
        """Return the page, which ends a margin below the last element."""
        width, height = self.width, round(self.y + margin)
        paper = Canvas(width)
        paper.box("paper", 0.5, 0.5, width - 1, height - 1, rounded=8)
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        said = 'role="img" aria-labelledby="title what"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {said}>',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="what">{escape(description)}</desc>',
            f"<style>{_STYLE}</style>",
            *paper.elements,
            *self.elements,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"
