"""The page at `/`: one HTML file that shows `/status` and refreshes itself.

For: its bytes and the headers that it is served with. Not for: what it shows, which is the page's
own script's. It loads nothing from anywhere else, and its Content-Security-Policy lets it do
nothing but what its one style sheet and its one script do: both are named by their hashes.
"""

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files
from typing import Final

PAGE: Final = files("proxy.observe").joinpath("status_page.html").read_bytes()


def _hash_of(element: bytes) -> str:
    """Return the CSP source of the page's only element of this name."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (element, element), PAGE, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'"


PAGE_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash_of(b'style')}",
            f"script-src {_hash_of(b'script')}",
            "connect-src 'self'",
            "img-src data:",  # its icon, so that a browser asks for none
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # no text can become markup
        ]
    ),
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
