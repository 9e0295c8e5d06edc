"""The page at `/`, and the table of reasons at `/reasons`: their files and HTTP headers.

For: what a browser is sent. Not for: what the page shows, which its own script decides.

Invariant: it loads nothing from other hosts. Its Content-Security-Policy allows its own style sheet
and its own script, and nothing else; text cannot become markup.
"""

from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from typing import Final

from proxy.errors import ErrorKind, ErrorRow
from proxy.observe.recent_errors import ANY_ROLE

_HTML: Final = "text/html; charset=utf-8"


def _file(name: str) -> bytes:
    return files("proxy.observe").joinpath(f"page/{name}").read_bytes()


def _reason_rows() -> Iterator[str]:
    """Yield a row for each reason: kinds that share one share a row."""
    kinds: dict[str, list[ErrorRow]] = {}
    for kind in ErrorKind:
        kinds.setdefault(kind.value.reason, []).append(kind.value)
    for reason, rows in kinds.items():
        states = ", ".join(dict.fromkeys(row.sqlstate for row in rows))
        texts = [text for row in rows for text in (row.message, row.hint.format(**ANY_ROLE))]
        lines = "".join(f"<p>{escape(text)}</p>" for text in dict.fromkeys(texts) if text)
        yield (
            f'<tr id="{reason}"><th scope="row"><code>{reason}</code></th>'
            f"<td><code>{states}</code></td><td>{lines}</td></tr>"
        )


FILES: Final[Mapping[str, tuple[bytes, str]]] = {
    "/": (_file("page.html"), _HTML),
    "/page.css": (_file("page.css"), "text/css; charset=utf-8"),
    "/page.js": (_file("page.js"), "text/javascript; charset=utf-8"),
    "/reasons": (
        _file("reasons.html").replace(b"<!-- rows -->", "\n".join(_reason_rows()).encode()),
        _HTML,
    ),
}
"""What is sent for each path, with its media type."""

PAGE_HEADERS: Final[Mapping[str, str]] = {
    # data: is the icon, so that a browser does not request one; trusted types: text cannot become
    # markup.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
