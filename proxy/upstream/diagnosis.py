"""What a failed connection or login means: an ErrorResponse, an event or an OSError -> ProxyError.

Two dialects come over one port. PostgreSQL sends FATAL with a true SQLSTATE. The front ends before
it send ERROR without a `V` field and always XX000, or FATAL with a code of their own. So the text
decides first, and only then the SQLSTATE (W29). Names that a text quotes are chosen by the client
and decide nothing. An error of PostgreSQL itself is passed on unchanged, with a hint where a person
can do something; an error about the state of the upstream has a kind of its own instead.

The rows are the table of connection errors in the Lakebase facts. Their order matters only where
one text contains another.
"""

import errno
import os
import re
import ssl
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxy.errors import ErrorKind, ProxyError
from proxy.wire.messages import ErrorResponse
from proxy.wire.secret import Secret
from proxy.wire.upstream_startup import UpstreamDisconnected, UpstreamEvent, UpstreamViolated
from proxy.wire.violations import UnsupportedAuthentication

_FRONT_END_SQLSTATE: Final = "XX000"
_RESETS: Final = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, ssl.SSLEOFError)
_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
# An apostrophe inside a word opens and closes nothing.
_QUOTED: Final = re.compile(r""""[^"]*"|(?<!\w)'[^']*'(?!\w)""")
# PostgreSQL truncates longer names, and quotes them truncated.
_NAME_BYTES_MAX: Final = 63
# What replaces the secret where an upstream repeats it.
_REPEATED: Final = b"(the credential)"
# Fields of an error that programs read; the others are text for people.
_CODES: Final = (b"S", b"V", b"C")


class _Text(NamedTuple):
    """One recognised piece of a message, compared in lower case."""

    text: str
    kind: ErrorKind


# Texts of the front ends and of the pooler, never of PostgreSQL itself.
_FRONT_END_TEXTS: Final = (
    _Text("not a valid jwt encoding", ErrorKind.NOT_A_TOKEN),
    _Text("jwt token has expired", ErrorKind.TOKEN_REJECTED),
    _Text("jwk not found", ErrorKind.TOKEN_REJECTED),
    _Text("invalid jwt token audience", ErrorKind.TOKEN_REJECTED),
    _Text("jwks settings for this role were not configured", ErrorKind.TOKEN_REJECTED),
    _Text("oauth: user is not authorized", ErrorKind.ROLE_KIND_REJECTED),
    _Text("invalid authorization for databricks identity login", ErrorKind.ROLE_KIND_REJECTED),
    _Text("native postgres login is disabled", ErrorKind.NATIVE_LOGIN_DISABLED),
    _Text("external authorization failed", ErrorKind.AUTHORIZATION_DENIED),
    _Text("connection does not have sni", ErrorKind.FRONT_END_PROTOCOL),
    _Text("insecure connection", ErrorKind.FRONT_END_PROTOCOL),
    _Text("invalid protocol version", ErrorKind.FRONT_END_PROTOCOL),
    _Text("unsupported frontend protocol", ErrorKind.FRONT_END_PROTOCOL),
    _Text("received unencrypted data", ErrorKind.FRONT_END_PROTOCOL),
    _Text("invalid length of startup packet", ErrorKind.FRONT_END_PROTOCOL),
    _Text("inconsistent project name", ErrorKind.ENDPOINT_OPTION),
    _Text("endpoint id is not specified", ErrorKind.ENDPOINT_OPTION),
    _Text("client handshake timeout", ErrorKind.UPSTREAM_TIMEOUT),
    _Text("authentication timed out", ErrorKind.UPSTREAM_TIMEOUT),
    _Text("internal error.", ErrorKind.FRONT_END_ERROR),
    _Text("invalid upstream handshake state", ErrorKind.FRONT_END_ERROR),
    _Text("endpoint is temporarily unavailable", ErrorKind.UPSTREAM_STARTING),
    _Text("control plane request failed", ErrorKind.UPSTREAM_STARTING),
    _Text("couldn't connect to compute node", ErrorKind.UPSTREAM_STARTING),
    _Text("failed to acquire permit", ErrorKind.UPSTREAM_BUSY),
    _Text("too many connections attempts", ErrorKind.UPSTREAM_BUSY),
    _Text("too many connections to this endpoint", ErrorKind.UPSTREAM_BUSY),
    _Text("sasl authentication failed", ErrorKind.POOLER_NEEDS_PASSWORD),
    _Text("no more connections allowed", ErrorKind.POOLER_FULL),
    _Text("query_wait_timeout", ErrorKind.POOLER_FULL),
    _Text("client_login_timeout", ErrorKind.UPSTREAM_TIMEOUT),
    _Text("pgbouncer cannot connect to server", ErrorKind.UPSTREAM_STARTING),
)

# Texts of a front end that may stand in DETAIL too, under a message that says less.
_DETAIL_TEXTS: Final = (
    _Text("private-link-not-supported", ErrorKind.NETWORK_DENIED),
    _Text("unsupported-destination-type", ErrorKind.NETWORK_DENIED),
    _Text("is blocked by databricks ip acl", ErrorKind.NETWORK_DENIED),
    _Text("is not allowed to connect", ErrorKind.NETWORK_DENIED),
    _Text("blocked network", ErrorKind.NETWORK_DENIED),
    _Text("vpc endpoint id is not specified", ErrorKind.NETWORK_DENIED),
    _Text("endpoint cannot be found", ErrorKind.ENDPOINT_GONE),
    _Text("endpoint is disabled", ErrorKind.ENDPOINT_DISABLED),
)

# Texts of PostgreSQL, its auth hook or the pooler. A front end may pass them on without their
# SQLSTATE and with other quotes.
_SERVER_TEXTS: Final = (
    _Text("did not match the security label", ErrorKind.IDENTITY_MISMATCH),
    _Text("password authentication failed for user", ErrorKind.PASSWORD_REJECTED),
    _Text("unsupported startup parameter", ErrorKind.POOLER_PARAMETER),
    _Text("remaining connection slots are reserved", ErrorKind.UPSTREAM_FULL),
    _Text("too many clients already", ErrorKind.UPSTREAM_FULL),
    _Text("too many connections for", ErrorKind.UPSTREAM_FULL),
    # Starting up, shutting down, in recovery mode, not yet accepting connections.
    _Text("the database system is ", ErrorKind.UPSTREAM_STARTING),
    _Text("terminating connection due to administrator command", ErrorKind.UPSTREAM_LOST),
    _Text("terminating connection because of crash", ErrorKind.UPSTREAM_LOST),
)

# Mistakes of the client, passed on by a front end without their SQLSTATE.
_CLIENT_TEXTS: Final = (
    _Text("unrecognized configuration parameter", ErrorKind.SETTING_UNKNOWN),
    _Text("invalid value for parameter", ErrorKind.SETTING_INVALID),
    _Text("invalid command-line argument", ErrorKind.ARGUMENT_INVALID),
    _Text("permission denied", ErrorKind.PRIVILEGE_MISSING),
)

# What PostgreSQL's own SQLSTATE means when no text was recognised.
_SQLSTATES: Final = {
    "22023": ErrorKind.SETTING_INVALID,
    "28P01": ErrorKind.PASSWORD_REJECTED,
    "3D000": ErrorKind.DATABASE_MISSING,
    "42501": ErrorKind.PRIVILEGE_MISSING,
    "42601": ErrorKind.ARGUMENT_INVALID,
    "42704": ErrorKind.SETTING_UNKNOWN,
    "53300": ErrorKind.UPSTREAM_FULL,
    "57P01": ErrorKind.UPSTREAM_LOST,
    "57P02": ErrorKind.UPSTREAM_LOST,
    "57P03": ErrorKind.UPSTREAM_STARTING,
}

# Errors of PostgreSQL or its hook that are not passed on unchanged: a restart of the upstream would
# look like one of the proxy, or the reason would be missing.
_REWORDED: Final = frozenset(
    (ErrorKind.IDENTITY_MISMATCH, ErrorKind.UPSTREAM_LOST, ErrorKind.UPSTREAM_STARTING)
)


# What the same refusal means for a login with a native role's password: other advice, and no new
# token.
_NATIVE: Final = {
    ErrorKind.TOKEN_REJECTED: ErrorKind.NATIVE_PASSWORD_REJECTED,
    ErrorKind.ROLE_KIND_REJECTED: ErrorKind.NATIVE_PASSWORD_REJECTED,
    ErrorKind.PASSWORD_REJECTED: ErrorKind.NATIVE_PASSWORD_REJECTED,
    ErrorKind.POOLER_NEEDS_PASSWORD: ErrorKind.NATIVE_PASSWORD_REJECTED,
    ErrorKind.ROLE_MISSING: ErrorKind.NATIVE_ROLE_MISSING,
}


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """What was sent to the upstream that refused; it may repeat any of it."""

    user: str
    database: str
    secret: Secret
    is_password: bool


def diagnose(error: ErrorResponse, attempt: LoginAttempt) -> ProxyError:
    """Return what an upstream's refusal means. No text in it repeats the secret."""
    kind, is_original = _kind(error, attempt)
    if attempt.is_password:
        kind = _NATIVE.get(kind, kind)
    told = _without(attempt.secret, error)
    original = told if is_original else None
    detail = " ".join(filter(None, (told.message, told.text(b"D"))))
    return ProxyError(kind, detail, user=attempt.user, original=original)


def _kind(error: ErrorResponse, attempt: LoginAttempt) -> tuple[ErrorKind, bool]:
    """Return what the error means, and whether it is passed on unchanged."""
    text = _plain_text(error.message, attempt)
    detail = _plain_text(error.text(b"D"), attempt)
    for row in _DETAIL_TEXTS:
        if row.text in text or row.text in detail:
            return row.kind, False
    for row in _FRONT_END_TEXTS:
        if row.text in text:
            return row.kind, False
    kind = _server_kind(error, text)
    if _from_front_end(error):
        if kind is None:
            mistakes = (row.kind for row in _CLIENT_TEXTS if row.text in text)
            return next(mistakes, ErrorKind.UPSTREAM_ERROR), False
        rejected = kind is ErrorKind.PASSWORD_REJECTED
        return (ErrorKind.TOKEN_REJECTED if rejected else kind), False
    if not error.sqlstate or kind in _REWORDED:
        return kind or ErrorKind.UPSTREAM_PROTOCOL, False
    return kind or ErrorKind.STARTUP_REFUSED, True


def _plain_text(message: str, attempt: LoginAttempt) -> str:
    """Return the message in lower case and without names, which are chosen by clients.

    The known names first, as they may contain quotes.
    """
    for name in (attempt.user, attempt.database):
        cut = name.encode()[:_NAME_BYTES_MAX].decode("utf-8", "replace")
        for quote in ("'", '"'):
            for written in (name, cut):
                message = message.replace(f"{quote}{written}{quote}", '""')
    return _QUOTED.sub('""', message.lower())


def _without(secret: Secret, error: ErrorResponse) -> ErrorResponse:
    """Return the error without the secret in any text that is for people."""
    return ErrorResponse(
        tuple(
            (name, value if name in _CODES else value.replace(secret.reveal(), _REPEATED))
            for name, value in error.fields
        )
    )


def _server_kind(error: ErrorResponse, text: str) -> ErrorKind | None:
    for row in _SERVER_TEXTS:
        if row.text in text:
            return row.kind
    if text.startswith(("role ", "database ")) and text.endswith("does not exist"):
        return ErrorKind.ROLE_MISSING if text.startswith("role") else ErrorKind.DATABASE_MISSING
    return _SQLSTATES.get(error.sqlstate)


def _from_front_end(error: ErrorResponse) -> bool:
    """Return whether the error has no `V` and no true SQLSTATE."""
    return not error.text(b"V") and error.sqlstate == _FRONT_END_SQLSTATE


def diagnose_event(event: UpstreamEvent) -> ProxyError:
    """Return what an event means that ends a dial, if only because it came out of order."""
    match event:
        case UpstreamViolated(violation):
            if isinstance(violation, UnsupportedAuthentication):
                return ProxyError(ErrorKind.UNSUPPORTED_AUTH, violation.message)
            return ProxyError(ErrorKind.UPSTREAM_PROTOCOL, violation.message)
        case UpstreamDisconnected():
            return ProxyError(ErrorKind.UPSTREAM_LOST)
        case _:
            return ProxyError(ErrorKind.UPSTREAM_PROTOCOL, f"{type(event).__name__} out of order")


def diagnose_network(error: OSError, where: str) -> ProxyError:
    """Return what a failure of TCP or TLS means. `where` was dialled."""
    if error.errno in _OUT_OF_RESOURCES:
        return ProxyError(ErrorKind.OUT_OF_RESOURCES, os.strerror(error.errno))
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProxyError(ErrorKind.UPSTREAM_CERTIFICATE, f"{where}: {error.verify_message}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        detail = f"{where}: TLS handshake failed: {getattr(error, 'reason', None) or 'no reason'}"
        return ProxyError(ErrorKind.UPSTREAM_TLS_FAILED, detail)
    if isinstance(error, _RESETS):
        return ProxyError(ErrorKind.UPSTREAM_LOST, f"{where}: the connection was reset")
    if isinstance(error, TimeoutError):
        return ProxyError(ErrorKind.UPSTREAM_UNREACHABLE, f"{where}: no answer")
    # By its number: the text may be a library's, which says only that it failed. Several addresses
    # that fail for different reasons have no number.
    number = error.errno or 0
    text = os.strerror(number) if number > 0 else str(error) or type(error).__name__
    detail = f"{where}: {text}"
    return ProxyError(ErrorKind.UPSTREAM_UNREACHABLE, detail)
