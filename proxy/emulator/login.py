"""The gateway's decisions at a login, without I/O: who may log in, and which error others get.

Both dialects are here: the errors of Lakebase's front end, Neon's proxy, PgBouncer and Postgres.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from proxy.emulator.endpoints import Dialect, Endpoint, neon_error
from proxy.emulator.tokens import Claims, Purpose, TokenIssuer, TokenProblem, TokenRefused
from proxy.wire import options as option_words
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import V3_0, StartupMessage

# The only startup parameters that the Autoscaling front end passes to Postgres.
_PASSED_PARAMETERS: Final = (b"user", b"database", b"application_name", b"replication", b"options")
# The settings that PgBouncer tracks for each client.
_TRACKED: Final = (
    *(b"client_encoding", b"datestyle", b"timezone", b"standard_conforming_strings"),
    *(b"application_name", b"intervalstyle"),
)
_PASS_ALL_WORD: Final = b"neon_proxy_params_compat:true"
_ENDPOINT_WORDS: Final = (b"endpoint=", b"project=")
_NATIVE_LOGIN_DISABLED: Final = "native postgres login is disabled for this endpoint"
_PROVISIONED_EXPIRED: Final = "Invalid authorization for databricks identity login"


class LoginRefused(Exception):
    """The gateway ends a login with this error."""

    def __init__(self, error: ErrorResponse) -> None:
        super().__init__(error.message)
        self.error = error


def check_version(startup: StartupMessage) -> None:
    """Raise LoginRefused unless the version is exactly 3.0; there is no negotiation."""
    if startup.version != V3_0:
        text = f"Unsupported frontend protocol {startup.version}: server supports 3.0 to 3.0"
        raise LoginRefused(ErrorResponse.fatal("0A000", text))


def find_endpoint(endpoints: Iterable[Endpoint], host: str | None) -> tuple[Endpoint, str]:
    """Return the endpoint of a host, and which of its hosts that is. Raises LoginRefused."""
    if host is None:
        raise LoginRefused(ErrorResponse.fatal("08006", "Connection does not have SNI."))
    for endpoint in endpoints:
        kind = endpoint.host_kind(host)
        if kind is not None:
            return endpoint, kind
    raise LoginRefused(neon_error("Control plane request failed: endpoint cannot be found"))


def check_endpoint(endpoint: Endpoint, host_kind: str, startup: StartupMessage) -> None:
    """Raise LoginRefused if the endpoint is closed to connections, or `options` name another."""
    if endpoint.disabled:
        raise LoginRefused(neon_error("Control plane request failed: endpoint is disabled"))
    if host_kind.startswith("read_only") and not endpoint.readable_secondaries:
        raise LoginRefused(ErrorResponse.fatal("28000", "External authorization failed."))
    for word in option_words.split_words(startup.get(b"options") or b""):
        name = _named_endpoint(word.text)
        if name is not None and name != endpoint.uid.encode():
            said = name.decode(errors="replace")
            text = f"Inconsistent project name inferred from SNI ('{endpoint.uid}') "
            raise LoginRefused(neon_error(text + f"and domain ('{said}')."))


def check_pooled(startup: StartupMessage) -> None:
    """Raise LoginRefused for settings that a transaction pooler does not track."""
    for pair, _ in startup.parameters:
        if pair.lower() not in (*_TRACKED, *_PASSED_PARAMETERS):
            text = f"unsupported startup parameter: {pair.decode(errors='replace')}"
            raise LoginRefused(ErrorResponse.fatal("08P01", text))
    for setting in option_words.settings(startup.get(b"options") or b""):
        name = setting.name.decode(errors="replace")
        text = f"unsupported startup parameter in options: {name}"
        raise LoginRefused(ErrorResponse.fatal("08P01", text))


def check_token(endpoint: Endpoint, issuer: TokenIssuer, token: str, user: str) -> Claims:
    """Return the claims of a valid token. Raises LoginRefused."""
    try:
        claims = issuer.inspect(token, Purpose.DATABASE)
    except TokenRefused as refused:
        not_a_token = refused.problem is TokenProblem.NOT_A_JWT
        if not_a_token and user in endpoint.native_passwords:
            raise LoginRefused(login_error(endpoint, "28000", _NATIVE_LOGIN_DISABLED)) from None
        if endpoint.dialect is Dialect.AUTOSCALING or not_a_token:
            raise LoginRefused(_token_error(endpoint, refused.problem)) from None
        if refused.problem is TokenProblem.EXPIRED:
            raise LoginRefused(ErrorResponse.fatal("28000", _PROVISIONED_EXPIRED)) from None
        raise LoginRefused(password_error(endpoint, user)) from None
    return claims


def may_use_role(endpoint: Endpoint, claims: Claims, user: str) -> bool:
    """Return whether the role is the identity's own, or a group of which it is a member."""
    return claims.identity == user or claims.identity in endpoint.members.get(user, ())


def identity_error(endpoint: Endpoint, claims: Claims, user: str) -> ErrorResponse:
    """Return the error for a valid token of another identity."""
    if endpoint.dialect is Dialect.AUTOSCALING:
        return _token_error(endpoint, TokenProblem.EXPIRED)
    text = (
        f'The token\'s identity "{claims.identity}" did not match the security label '
        f'configured for role "{user}"'
    )
    return login_error(endpoint, "28000", text)


def _token_error(endpoint: Endpoint, problem: TokenProblem) -> ErrorResponse:
    """Return the error for a refused token; 28P01 has been seen for an expired or misfit one."""
    if problem is TokenProblem.EXPIRED:
        fields = ((b"S", b"ERROR"), (b"C", b"28P01"), (b"M", problem.value.encode()))
        return ErrorResponse(fields)
    return login_error(endpoint, "28000", problem.value)


def password_error(endpoint: Endpoint, user: str) -> ErrorResponse:
    """Return the error for a wrong password, or for a role that does not exist."""
    quote = "'" if endpoint.dialect is Dialect.AUTOSCALING else '"'
    text = f"password authentication failed for user {quote}{user}{quote}"
    return login_error(endpoint, "28P01", text)


@contextmanager
def slot(endpoint: Endpoint) -> Iterator[None]:
    """Hold one of the endpoint's connection slots. Raises LoginRefused if none is left."""
    if endpoint.sessions_max is not None and endpoint.slots >= endpoint.sessions_max:
        text = "remaining connection slots are reserved for roles with the SUPERUSER attribute"
        raise LoginRefused(login_error(endpoint, "53300", text))
    endpoint.slots += 1
    try:
        yield
    finally:
        endpoint.slots -= 1


def relayed_error(endpoint: Endpoint, user: str, error: ErrorResponse) -> ErrorResponse:
    """Return Postgres' login error as the client gets it: in Neon's dialect without SQLSTATE."""
    if error.sqlstate == "28000" and error.message.endswith("does not exist"):
        return password_error(endpoint, user)
    if endpoint.dialect is Dialect.AUTOSCALING:
        return neon_error(error.message)
    return error


def login_error(endpoint: Endpoint, sqlstate: str, text: str) -> ErrorResponse:
    """Return an error of Postgres as the endpoint's dialect words it."""
    if endpoint.dialect is Dialect.AUTOSCALING:
        return neon_error(text)
    return ErrorResponse.fatal(sqlstate, text)


def backend_parameters(
    endpoint: Endpoint, startup: StartupMessage, *, pooled: bool
) -> tuple[tuple[bytes, bytes], ...]:
    """Return the client's startup parameters that are passed to Postgres."""
    if endpoint.dialect is Dialect.PROVISIONED or pooled:
        return startup.parameters
    words = option_words.split_words(startup.get(b"options") or b"")
    passes_all = any(word.text == _PASS_ALL_WORD for word in words)
    kept = b" ".join(word.raw for word in words if not _is_front_end_word(word.text))
    passed = [
        (name, kept if name == b"options" else value)
        for name, value in startup.parameters
        if (passes_all or name in _PASSED_PARAMETERS) and (name != b"options" or kept)
    ]
    return (*passed, (b"client_encoding", b"UTF8"))


def _named_endpoint(word: bytes) -> bytes | None:
    return next((word[len(p) :] for p in _ENDPOINT_WORDS if word.startswith(p)), None)


def _is_front_end_word(word: bytes) -> bool:
    return _named_endpoint(word) is not None or word.startswith(b"neon_")
