"""The page at `/`: one HTML file that shows `/status` and refreshes itself.

For: its bytes and its HTTP headers. Not for: what it shows, which its own script decides.

Invariant: it loads nothing from other hosts. Its Content-Security-Policy allows its one style sheet
and its one script, by their hashes, and nothing else.
"""

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files
from typing import Final

PAGE: Final = files("proxy.observe").joinpath("status_page.html").read_bytes()


def _hash_of(element: bytes) -> str:
    """Return the CSP source for the page's only element of this name."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (element, element), PAGE, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'"


PAGE_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash_of(b'style')}",
            f"script-src {_hash_of(b'script')}",
            "connect-src 'self'",
            "img-src data:",  # its icon, so that a browser does not request one
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # text cannot become markup
        ]
    ),
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
