"""What databricks-sdk fails with, as ProxyErrors: one table.

Its API calls fail by status; its login and its own checks are bare ValueErrors whose text differs
from version to version. So a refused login is told by the status that the exchange has kept.

For: the kind, and a text that may be shown. Invariant: no secret that was shown in the exchange, or
that the settings hold, is in that text.
"""

import errno
import os
from collections.abc import Iterable
from functools import cache
from typing import Final, NamedTuple

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import MASK, mask
from proxy.workspace.sdk_http import Refusal, SDKCall

_TEXT_CHARACTERS_MAX: Final = 300  # of what the SDK says, in the DETAIL of an error

# What the SDK makes of an error of the platform's, and not of OAuth's, in answer to a login.
_DROPPED: Final = "unknown: unknown"

# A login is refused with 400 or 401 (RFC 6749, section 5.2), or with 403 by what stands before it.
_LOGIN_REFUSED: Final = frozenset((400, 401, 403))
_THROTTLED: Final = 429


class _Row(NamedTuple):
    """One case: the exception's class, a piece of its text where that decides, what it means."""

    error: type[Exception]
    text: str  # in lower case
    kind: ErrorKind


@cache
def _rows() -> tuple[_Row, ...]:
    """Return what the SDK fails with, the first row that fits being the one; all that is left is
    a login that was refused, or an API that cannot be reached: 5xx, time-outs, refused
    connections, replies that are not JSON.
    """
    from databricks.sdk import errors  # noqa: PLC0415 - slow, and imported by now

    kinds = ErrorKind
    return (
        # At any call, the login included, and in whatever form.
        _Row(Exception, "databricks ip acl", kinds.IP_BLOCKED),
        _Row(Exception, "certificate verify failed", kinds.WORKSPACE_CERTIFICATE),
        # The API, by its status; a 403 says in its text which of several things is missing.
        _Row(errors.Unauthenticated, "", kinds.WORKSPACE_LOGIN_FAILED),
        _Row(
            errors.PermissionDenied, "workspace-access entitlement", kinds.WORKSPACE_ACCESS_MISSING
        ),
        _Row(errors.PermissionDenied, "does not have required scopes", kinds.PAT_SCOPE),
        _Row(errors.PermissionDenied, "", kinds.PERMISSION_DENIED),
        _Row(errors.NotFound, "", kinds.ENDPOINT_NOT_FOUND),
        _Row(errors.BadRequest, "", kinds.ENDPOINT_INVALID),
        _Row(errors.ResourceConflict, "", kinds.API_BUSY),
        _Row(errors.TooManyRequests, "", kinds.API_THROTTLED),
        # The SDK's own checks, told apart by their text alone.
        _Row(ValueError, "cannot configure default credentials", kinds.CONFIGURATION_INVALID),
        _Row(ValueError, "more than one authorization", kinds.CONFIGURATION_INVALID),
        _Row(ValueError, "profile configured", kinds.CONFIGURATION_INVALID),
    )


def translate(error: Exception, sdk_call: SDKCall, secrets: Iterable[str]) -> ProxyError:
    """Return what an exception of the SDK means. Its text is not passed on whole.

    Messages of 401 and 403 carry the SDK's configuration; the secret in it is masked, but nothing
    of it belongs in front of a client. `secrets` are those of the settings.
    """
    if isinstance(error, TimeoutError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the SDK's budget is spent, and this was its last failure
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return ProxyError(ErrorKind.OUT_OF_RESOURCES, os.strerror(error.errno))
    refusal = sdk_call.refusal
    text = str(error)
    if _DROPPED in text and refusal is not None:
        text = refusal.text
    kind = _row_of(error, text) or _login(error, refusal) or ErrorKind.API_UNREACHABLE
    retry_after_seconds = float(getattr(error, "retry_after_secs", None) or 0)
    if kind is ErrorKind.API_THROTTLED and refusal is not None:
        retry_after_seconds = max(retry_after_seconds, refusal.retry_after_seconds)
    shown = _short(_masked(text, {*secrets, *sdk_call.sent_secrets}))
    return ProxyError(kind, shown, retry_after_seconds=retry_after_seconds)


def _row_of(error: Exception, text: str) -> ErrorKind | None:
    lower = text.lower()
    fitting = (row.kind for row in _rows() if isinstance(error, row.error) and row.text in lower)
    return next(fitting, None)


def _login(error: Exception, refusal: Refusal | None) -> ErrorKind | None:
    """Return what a login that was answered with a refusal means."""
    if refusal is None or not isinstance(error, ValueError):
        return None
    if refusal.status == _THROTTLED:
        return ErrorKind.API_THROTTLED
    return ErrorKind.WORKSPACE_LOGIN_FAILED if refusal.status in _LOGIN_REFUSED else None


def _masked(text: str, secrets: set[str]) -> str:
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return mask(text)


def _short(text: str) -> str:
    for tail in (". Config:", ". Env:", "\n"):
        text = text.partition(tail)[0]
    return text[:_TEXT_CHARACTERS_MAX]
