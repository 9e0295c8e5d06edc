"""The HTTP requests of one call of databricks-sdk: none outlives the call that it is for.

The SDK's login request has no timeout at all, and its discovery has one of 300 seconds. They go
through functions of `requests` that take no default, so that the one place where each of them
passes, `Session.send`, is where each gets what is left of its call's time. A call whose asker has
given up therefore ends soon after, and its thread with it.

On the way is kept what the SDK drops: the status and the text of a login that was refused, and
which secrets were shown, so that none of them is in a text that is passed on.
"""

import base64
import binascii
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # slow to import: only in a thread
    from requests import PreparedRequest, Response, Session

# One HTTP request, so that another fits the time for one token.
REQUEST_SECONDS_MAX: Final = 15.0
# Whoever waits for the call shall hear its deadline from us, not from the socket.
GRACE_SECONDS: Final = 1.0


_VERIFY_FAILED: Final = "certificate verify failed"


class CertificateRejected(Exception):
    """The other side's certificate does not verify. None of those that the SDK tries again after:
    it would spend half of the call's time on that."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a POST was answered that failed."""

    status: int
    text: str
    retry_after_seconds: float


@dataclass(slots=True)
class SDKCall:
    """What is known of one call. `ends_at` is of `time.monotonic`."""

    ends_at: float
    refusal: Refusal | None = None
    sent_secrets: set[str] = field(default_factory=set, repr=False)


_current: ContextVar[SDKCall | None] = ContextVar("sdk_call", default=None)


@contextmanager
def bounded_requests(timeout_seconds: float) -> Iterator[SDKCall]:
    """Bound the requests that are made in this thread inside the block."""
    _bound_requests()
    begun = SDKCall(time.monotonic() + timeout_seconds)
    token = _current.set(begun)
    try:
        yield begun
    finally:
        _current.reset(token)


@cache
def _bound_requests() -> None:
    """Have every request of this process pass here; only the SDK makes any."""
    from requests import Session  # noqa: PLC0415 - slow: see above

    send = Session.send

    def bounded(session: "Session", request: "PreparedRequest", **options: Any) -> "Response":
        return _send(lambda **bound: send(session, request, **bound), request, options)

    Session.send = bounded  # type: ignore[assignment,method-assign]


def _send(
    send: Callable[..., "Response"], request: "PreparedRequest", options: dict[str, Any]
) -> "Response":
    current = _current.get()
    given = options.get("timeout")
    seconds = min(REQUEST_SECONDS_MAX, given) if isinstance(given, int | float) else None
    seconds = seconds or REQUEST_SECONDS_MAX
    if current is None:  # a thread of the SDK's own
        return send(**{**options, "timeout": seconds})
    left_seconds = current.ends_at - time.monotonic()
    if left_seconds <= 0:
        # No error that the SDK would try again after.
        raise TimeoutError("nobody waits for it any more")
    current.sent_secrets |= _secrets(request.headers.get("Authorization") or "")
    try:
        response = send(**{**options, "timeout": min(seconds, left_seconds + GRACE_SECONDS)})
    except OSError as error:  # as all of the library's are
        _, verify_failed, why = str(error).partition(_VERIFY_FAILED)
        if verify_failed:
            raise CertificateRejected(_VERIFY_FAILED + why.partition(" (_ssl")[0]) from None
        raise
    if request.method == "POST":
        current.refusal = None if response.ok else _refusal(response)
    return response


def _refusal(response: "Response") -> Refusal:
    try:
        seconds = float(response.headers.get("Retry-After") or 0)
    except ValueError:  # a date, which this API is not known to send
        seconds = 0.0
    return Refusal(response.status_code, response.text, max(0.0, seconds))


def _secrets(authorization: str | bytes) -> set[str]:
    """Return what an Authorization header shows: the token; of a Basic login its secret, too."""
    text = authorization if isinstance(authorization, str) else authorization.decode("latin-1")
    scheme, _, shown = text.partition(" ")
    secrets = {shown}
    if scheme == "Basic":
        with suppress(binascii.Error, UnicodeDecodeError):  # it is masked as it is, then
            secrets.add(base64.b64decode(shown).decode().partition(":")[2])
    return secrets - {""}
