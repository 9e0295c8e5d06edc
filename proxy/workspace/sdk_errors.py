"""The exceptions of databricks-sdk as ProxyErrors: one table.

API calls fail by status. The login and the SDK's own checks raise bare ValueErrors, whose text
differs between versions: a refused login is recognised by the HTTP status that `sdk_http` has kept.

For: the kind, and a text for client and log. Invariant: no secret that was sent in the call, or
that the settings hold, is in that text.
"""

import errno
import os
import re
from collections.abc import Iterable
from functools import cache
from typing import Final, NamedTuple

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import mask
from proxy.wire.secret import MASK
from proxy.workspace.sdk_http import NO_TLS, PROXY_REFUSED, Refusal, SDKCall

_TEXT_CHARACTERS_MAX: Final = 300  # of what the SDK says, in the DETAIL of an error

# The SDK's text for a login that was answered with an error of the platform, not of OAuth.
_DROPPED: Final = "unknown: unknown"

# A login is refused with 400 or 401 (RFC 6749, section 5.2), or with 403 by a gateway before it.
_LOGIN_REFUSED: Final = frozenset((400, 401, 403))
_THROTTLED: Final = 429
# So no workspace answers discovery. A refusal may be of a gateway in between.
_NOT_THERE: Final = frozenset((400, 404, 405, 410))
_FAILED_MIN: Final = 500  # this status and those above are failures of the server
# The SDK's text for an error that is not JSON; a whole request follows it.
_UNPARSED: Final = "unable to parse response"
# What the API says, with 403, of a token that has expired or was revoked.
_REFUSED: Final = "invalid access token"


class _Row(NamedTuple):
    """One case: the exception's class, a part of its text where that decides, and the kind."""

    error: type[Exception]
    text: str  # in lower case
    kind: ErrorKind


@cache
def _rows() -> tuple[_Row, ...]:
    """Return the table; the first row that matches decides.

    Without a match it is a refused login, an API that fails (5xx), or one that cannot be reached:
    time-outs, refused connections, replies that are not JSON.
    """
    from databricks.sdk import errors  # noqa: PLC0415 - slow, and imported by now

    kinds = ErrorKind
    return (
        # In any call, the login included, and in any form.
        _Row(Exception, "databricks ip acl", kinds.IP_BLOCKED),
        _Row(Exception, "unauthorized network access", kinds.WORKSPACE_NETWORK_DENIED),
        _Row(Exception, "not accessible from the current network", kinds.WORKSPACE_NETWORK_DENIED),
        _Row(Exception, "certificate verify failed", kinds.WORKSPACE_CERTIFICATE),
        _Row(Exception, NO_TLS.lower(), kinds.CONFIGURATION_MISTAKE),
        _Row(Exception, PROXY_REFUSED, kinds.CONFIGURATION_MISTAKE),
        _Row(RuntimeError, "can't start new thread", kinds.OUT_OF_RESOURCES),
        # The API, by its status; the text of a 403 says what is missing.
        _Row(errors.Unauthenticated, "", kinds.WORKSPACE_LOGIN_FAILED),
        _Row(
            errors.PermissionDenied, "workspace-access entitlement", kinds.WORKSPACE_ACCESS_MISSING
        ),
        _Row(errors.PermissionDenied, "does not have required scopes", kinds.PAT_SCOPE),
        _Row(errors.PermissionDenied, _REFUSED, kinds.WORKSPACE_LOGIN_FAILED),
        _Row(errors.PermissionDenied, "", kinds.PERMISSION_DENIED),
        _Row(errors.NotFound, "", kinds.ENDPOINT_NOT_FOUND),
        _Row(errors.BadRequest, "", kinds.ENDPOINT_INVALID),
        _Row(errors.ResourceConflict, "", kinds.API_BUSY),
        _Row(errors.TooManyRequests, "", kinds.API_THROTTLED),
        # The SDK's own checks, which differ in their text alone.
        _Row(ValueError, "cannot configure default credentials", kinds.CONFIGURATION_INVALID),
        _Row(ValueError, "more than one authorization", kinds.TWO_LOGINS),
        # Of databricks auth login, or az login: their own program said so.
        _Row(Exception, "cannot get access token", kinds.LOGIN_PROGRAM_FAILED),
    )


def translate(error: Exception, sdk_call: SDKCall, secrets: Iterable[str]) -> ProxyError:
    """Return what an exception of the SDK means. Its text is not passed on in full.

    Messages of 401 and 403 contain the SDK's configuration, which no client is to see, although its
    secret is masked. `secrets` are those of the settings.
    """
    if isinstance(error, TimeoutError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the SDK's time budget is spent, and this was its last failure
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return ProxyError(ErrorKind.OUT_OF_RESOURCES, os.strerror(error.errno))
    refusal, failure = sdk_call.refusal, sdk_call.failure
    text = str(error)
    if _DROPPED in text and refusal is not None:
        text = refusal.text
    if _UNPARSED in text and failure is not None:
        text = f"HTTP {failure.status} {_plain(failure.text)}"
    if sdk_call.is_page:
        kind: ErrorKind | None = ErrorKind.SIGN_IN_PAGE
    else:
        kind = _row_of(error, text) or _login(error, refusal)
    if kind is None and failure is not None:
        kind, status = _by_status(failure), f"HTTP {failure.status}"
        text = text if kind is None or status in text else f"{status} {text}"
    kind = kind or ErrorKind.API_UNREACHABLE
    retry_after_seconds = float(getattr(error, "retry_after_secs", None) or 0)
    if kind is ErrorKind.API_THROTTLED:
        replies = (reply.retry_after_seconds for reply in (refusal, failure) if reply is not None)
        retry_after_seconds = max(retry_after_seconds, *replies, 0.0)
    text = _short(_masked(text, {*secrets, *sdk_call.sent_secrets}))
    return ProxyError(kind, text, retry_after_seconds=retry_after_seconds)


def is_login_refused(error: Exception) -> bool:
    """Return whether the API refused the workspace token: a new login may get another one."""
    from databricks.sdk import errors  # noqa: PLC0415 - slow, and imported by now

    if isinstance(error, errors.PermissionDenied):
        return _REFUSED in str(error).lower()
    return isinstance(error, errors.Unauthenticated)


def _row_of(error: Exception, text: str) -> ErrorKind | None:
    lower = text.lower()
    fitting = (row.kind for row in _rows() if isinstance(error, row.error) and row.text in lower)
    return next(fitting, None)


def _login(error: Exception, refusal: Refusal | None) -> ErrorKind | None:
    """Return the kind of a login that was refused."""
    if refusal is None or not isinstance(error, ValueError):
        return None
    if refusal.status == _THROTTLED:
        return ErrorKind.API_THROTTLED
    return ErrorKind.WORKSPACE_LOGIN_FAILED if refusal.status in _LOGIN_REFUSED else None


def _by_status(failure: Refusal) -> ErrorKind | None:
    """Return the kind of a reply that neither class nor text of the SDK's exception tells."""
    if failure.status >= _FAILED_MIN:
        return ErrorKind.API_ERROR
    if failure.status == _THROTTLED:
        return ErrorKind.API_THROTTLED
    is_wrong = failure.is_discovery and failure.status in _NOT_THERE
    return ErrorKind.NOT_A_WORKSPACE if is_wrong else None


def _masked(text: str, secrets: set[str]) -> str:
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return mask(text)


def _plain(text: str) -> str:
    """Return the words of a page, without its tags."""
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def _short(text: str) -> str:
    for tail in (". Config:", ". Env:", "\n"):
        text = text.partition(tail)[0]
    return text[:_TEXT_CHARACTERS_MAX]
