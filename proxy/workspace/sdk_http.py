"""The HTTP requests of one call of databricks-sdk: none outlives the call that it is for.

The SDK's login request has no timeout, and its discovery has one of 300 seconds. Both use functions
of `requests` that have no default timeout. Every request passes through `Session.send`, and there
each gets what is left of its call's time, for all of its reply (`http_adapter`). So a call that is
abandoned ends soon after, and its thread and its connection with it.

The same place keeps what the SDK drops: status and text of a reply that is an error, the server's
time, and the secrets that were sent, so that none of them is in a text that is passed on.
"""

import base64
import binascii
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from proxy.config.validators import BLANKS

if TYPE_CHECKING:  # slow to import: only in a thread
    from requests import PreparedRequest, Response, Session

# For one HTTP request, so that a second one fits the time for one token.
REQUEST_SECONDS_MAX: Final = 15.0
# The caller's deadline ends the call first, so that its error names the deadline and not a socket.
GRACE_SECONDS: Final = 1.0


# The SDK tries these again after a sleep.
_RETRIED: Final = frozenset((429, 503))
_BEFORE_A_PAGE: Final = b"\xef\xbb\xbf \t\r\n"
_DISCOVERY: Final = "/.well-known/"

# What is reported for what a second try does not change, and the libraries' words for it. An HTTP
# proxy refuses a tunnel with 4xx; 408 and 429 ask to come again.
PROXY_REFUSED: Final = "the proxy refused "
NO_TLS: Final = "the server does not speak TLS"
_TUNNEL_REFUSED: Final = re.compile(r"Tunnel connection failed: (4(?!08|29)\d\d)")
_NO_TLS: Final = "WRONG_VERSION_NUMBER"
_PROXY_LOGIN: Final = "407"

_VERIFY_FAILED: Final = "certificate verify failed"


class CertificateRejected(Exception):
    """The server's certificate does not verify.

    It is no exception that the SDK retries, which would take half of the call's time.
    """


class NotConnected(Exception):
    """There is no connection, and the call is not to be tried again. The SDK does not try again."""


class SignInPage(Exception):
    """The reply is a web page, of a sign-in most likely. The SDK does not try again."""


class DiscoveryRefused(Exception):
    """The reply asks to try again later.

    The SDK would sleep for that, and for discovery not with the clock that it was given.
    """


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reply that is an error."""

    status: int
    text: str
    retry_after_seconds: float
    is_discovery: bool
    """Of the request for where to log in, which each workspace answers without a login."""


@dataclass(slots=True)
class SDKCall:
    """One call of the SDK. `ends_at` is a time of `time.monotonic`.

    Without `retries` a connection that fails is final.
    `refusal` is of the last POST, `failure` of the last request, None if it was answered otherwise.
    `is_page` says that the last reply was a web page: the SDK reports only its text.
    `server_time` is the time of the last reply by the server's clock, in seconds since the epoch.
    """

    ends_at: float
    ca_file: str = ""
    retries: bool = True
    refusal: Refusal | None = None
    failure: Refusal | None = None
    is_page: bool = False
    server_time: float | None = None
    sent_secrets: set[str] = field(default_factory=set, repr=False)


_current: ContextVar[SDKCall | None] = ContextVar("sdk_call", default=None)


@contextmanager
def bounded_requests(
    timeout_seconds: float, ca_file: str = "", *, retries: bool = True
) -> Iterator[SDKCall]:
    """Bound the requests that this thread makes inside the block; trust the file's authorities."""
    _bound_requests()
    call = SDKCall(time.monotonic() + timeout_seconds, ca_file, retries)
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


@cache
def _bound_requests() -> None:
    """Route every request of this process through `_send`; only the SDK makes any."""
    from requests import Session  # noqa: PLC0415 - slow

    from proxy.workspace.http_adapter import BoundedAdapter  # noqa: PLC0415

    send = Session.send

    def bounded(session: "Session", request: "PreparedRequest", **options: Any) -> "Response":
        for prefix in ("https://", "http://"):
            if not isinstance(session.adapters.get(prefix), BoundedAdapter):
                session.mount(prefix, BoundedAdapter())
        return _send(lambda **bound: send(session, request, **bound), request, options)

    Session.send = bounded  # type: ignore[assignment,method-assign]


def usable_proxies(urls: Mapping[str, str]) -> dict[str, str]:
    """Return the URLs of HTTP proxies by scheme, without blanks around them and empty ones."""
    return {scheme: text for scheme, url in urls.items() if (text := url.strip(BLANKS))}


def proxy_variable(url: str, proxy_url: str, environ: Mapping[str, str]) -> str:
    """Return the variable that names this HTTP proxy for requests to a URL."""
    scheme = urlsplit(url).scheme
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    found = (name for name in names if environ.get(name, "").strip(BLANKS) == proxy_url)
    return next(found, "HTTPS_PROXY")


def _send(
    send: Callable[..., "Response"], request: "PreparedRequest", options: dict[str, Any]
) -> "Response":
    call = _current.get()
    given = options.get("timeout")
    seconds = given if isinstance(given, int | float) and given else REQUEST_SECONDS_MAX
    seconds = min(seconds, REQUEST_SECONDS_MAX)
    if call is None:  # in a thread of the SDK
        return send(**{**options, "timeout": seconds})
    left_seconds = call.ends_at - time.monotonic()
    if left_seconds <= 0:
        # It is no exception that the SDK retries.
        raise TimeoutError("the call's time is over")
    call.sent_secrets |= _secrets(request.headers.get("Authorization") or "")
    timeout_seconds = min(seconds, left_seconds + GRACE_SECONDS)
    call.failure, call.is_page = None, False
    if call.ca_file:
        options = {**options, "verify": call.ca_file}
    options = {
        **options,
        "timeout": timeout_seconds,
        "proxies": usable_proxies(options.get("proxies") or {}),
    }
    response = _send_verified(send, request.url or "", options, call.retries)
    call.failure = None if response.ok else _refusal(response)
    call.is_page = _is_page(response)
    call.server_time = _time(response.headers.get("Date"))
    if request.method == "POST":
        call.refusal = call.failure
    if call.is_page:
        raise SignInPage(f"HTTP {response.status_code} with a page in HTML")
    if call.failure is not None and call.failure.is_discovery and response.status_code in _RETRIED:
        raise DiscoveryRefused(f"HTTP {response.status_code} {response.text}")
    return response


def _is_page(response: "Response") -> bool:
    """Return whether a reply that should be JSON is a web page; the SDK knows one of these."""
    if not response.ok or response.is_redirect or "private-link" in response.url:
        return False
    kind = response.headers.get("Content-Type") or ""
    return kind.startswith("text/html") or response.content.lstrip(_BEFORE_A_PAGE)[:1] == b"<"


def _time(date: str | None) -> float | None:
    """Return the time of a Date header, None if it has none."""
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def _send_verified(
    send: Callable[..., "Response"], url: str, options: dict[str, Any], retries: bool
) -> "Response":
    """Send a request.

    Raises CertificateRejected, and NotConnected for what another try does not change or without
    `retries`, in place of the library's own exceptions.
    """
    from requests import ConnectionError as ConnectionFailed  # noqa: PLC0415 - imported by now

    try:
        return send(**options)
    except OSError as error:  # the base of all exceptions of `requests`
        _, verify_failed, why = str(error).partition(_VERIFY_FAILED)
        if verify_failed:
            raise CertificateRejected(_VERIFY_FAILED + why.partition(" (_ssl")[0]) from None
        if told := _mistake(str(error), url, options["proxies"]):
            raise NotConnected(told) from None
        if not retries and isinstance(error, ConnectionFailed):
            raise NotConnected(str(error)) from None
        raise


def _mistake(text: str, url: str, proxies: dict[str, str]) -> str:
    """Return what to report of a connection that fails for good; "" if another try may succeed."""
    from requests.utils import select_proxy  # noqa: PLC0415 - imported by now

    if _NO_TLS in text:
        return f"workspace.host or the scheme of HTTPS_PROXY: {NO_TLS}"
    refused = _TUNNEL_REFUSED.search(text)
    if refused is None:
        return ""
    variable = proxy_variable(url, select_proxy(url, proxies) or "", os.environ)
    if refused[1] == _PROXY_LOGIN:
        return f"{variable}: {PROXY_REFUSED}its user and password"
    return (
        f"{variable}: {PROXY_REFUSED}the connection to the workspace: {refused[1]} (does it allow "
        "the workspace's host, or must NO_PROXY name it?)"
    )


def _refusal(response: "Response") -> Refusal:
    try:
        seconds = float(response.headers.get("Retry-After") or 0)
    except ValueError:  # a date, which this API does not send as far as is known
        seconds = 0.0
    is_discovery = _DISCOVERY in response.url
    return Refusal(response.status_code, response.text, max(0.0, seconds), is_discovery)


def _secrets(authorization: str | bytes) -> set[str]:
    """Return the secrets in an Authorization header: the token, and a Basic login's secret."""
    text = authorization if isinstance(authorization, str) else authorization.decode("latin-1")
    scheme, _, secret = text.partition(" ")
    secrets = {secret}
    if scheme == "Basic":
        with suppress(binascii.Error, UnicodeDecodeError):  # then only the header's text is masked
            secrets.add(base64.b64decode(secret).decode().partition(":")[2])
    return secrets - {""}
