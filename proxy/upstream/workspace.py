"""The Databricks workspace, through databricks-sdk: who we are, where an endpoint is, credentials.

The only module that knows the SDK. Its calls block and its exceptions are many: they run in
threads under `mint_timeout_seconds`, and come out as ProxyError. What a caller does not set is left
to the SDK's own discovery (environment, profile, projected tokens).

Observed behaviour of the SDK that shapes this file: no timeout and no retry on the token request,
which also holds a lock; the constructor may do HTTP; a reply may lack any field.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from pydantic import SecretStr

from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.resources import Resource, ResourceStatus
from proxy.upstream.threads import Threads
from proxy.wire.secret import Secret

if TYPE_CHECKING:  # importing it takes more than a second: only in a thread, and only once needed
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.clock import Clock

_PRODUCT: Final = "lakebase-auth-proxy"
_REQUEST_SECONDS_MAX: Final = 15  # one HTTP request, so that a retry still fits the mint's time
# The SDK looks at its budget only between tries, and only it knows what the last one failed with:
# its budget must be spent well before our own deadline.
_RETRY_PART: Final = 0.5
_SDK_JITTER_SECONDS_MAX: Final = 1.0  # what it adds to a Retry-After
_TEXT_CHARACTERS_MAX: Final = 300  # of what the SDK says, in the DETAIL of an error

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Credential:
    """What is shown as the password. Both times are seconds since the epoch, on the wall clock."""

    secret: Secret
    requested_at: float
    expires_at: float
    is_password: bool = False  # of a native role: answers SCRAM too, and never ages


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a token logs in as: the client id of a service principal, or a person's user name."""

    role: str
    host: str
    auth_type: str


class Workspace:
    """One workspace and one identity in it."""

    def __init__(
        self,
        settings: WorkspaceSettings,
        credentials: CredentialsSettings,
        *,
        version: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._timeout_seconds = credentials.mint_timeout_seconds
        self._version = version
        self._clock = clock
        self._threads = Threads("databricks-sdk")
        self._client: WorkspaceClient | None = None
        self._file_secret: Secret | None = None

    async def mint(self, resource: Resource) -> Credential:
        """Return a new database credential. Raises ProxyError."""
        requested_at = self._clock()
        minted = await self._call(resource.mint)
        if not minted.token or minted.expires_at is None:
            raise ProxyError(ErrorKind.CREDENTIAL_INVALID, "it has no token or no expiry")
        expires_at = minted.expires_at.timestamp()
        if expires_at <= self._clock():
            raise ProxyError(ErrorKind.CREDENTIAL_INVALID, "it has expired already")
        return Credential(Secret(minted.token.encode()), requested_at, expires_at)

    async def status(self, resource: Resource) -> ResourceStatus:
        """Return state and host of a resource. Raises ProxyError."""
        return await self._call(resource.status)

    async def identity(self) -> Identity:
        """Return who we are, by a call that the workspace must accept. Raises ProxyError."""
        return await self._call(_identity)

    async def clock_ahead_seconds(self) -> float | None:
        """Return how far this machine's clock is ahead of the workspace's, to about a second.

        None if the workspace does not say. Raises ProxyError.
        """
        there = await self._call(_date)
        return None if there is None else self._clock() - there

    async def _call(self, call: Callable[["WorkspaceClient"], T]) -> T:
        def work() -> T:
            try:
                return self._call_here(call)
            except TimeoutError as error:  # the SDK's budget is spent: what was the last failure?
                # Here, because an exception of this type loses its cause between threads.
                if isinstance(error.__cause__, Exception):
                    raise error.__cause__ from None
                raise

        try:
            return await self._threads.run(work, self._timeout_seconds)
        except TimeoutError as error:
            # The call may hang inside a lock of this client: leave both behind.
            self._client = None
            detail = f"no answer within {self._timeout_seconds:g} seconds"
            raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from error
        except ProxyError:
            raise
        except ImportError as error:
            raise ProxyError(
                ErrorKind.INTERNAL, f"databricks-sdk cannot be used: {error}"
            ) from error
        except Exception as error:
            self._client = None  # a refused workspace token would be cached with it
            raise _translate(error) from error

    def _call_here(self, call: Callable[["WorkspaceClient"], T]) -> T:
        """Call with the client there is, or a new one; blocks, in a thread."""
        self._read_secret_file()
        client = self._client
        if client is not None:
            with suppress(_unauthenticated()):  # the workspace token that it keeps may be old
                return call(client)
        # Two threads may make one each; the later one stays, the other is garbage.
        client = self._client = self._connect()
        return call(client)

    def _read_secret_file(self) -> None:
        """Read `client_secret_file` again: a secret that has been rotated makes a new client."""
        if not self._settings.client_secret_file:
            return
        try:
            secret = Secret(Path(self._settings.client_secret_file).read_bytes().strip())
            secret.reveal().decode()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            detail = f"workspace.client_secret_file: {why}"
            raise ProxyError(ErrorKind.CONFIGURATION_INVALID, detail) from None
        if secret != self._file_secret:
            self._file_secret = secret
            self._client = None

    def _connect(self) -> "WorkspaceClient":
        from databricks.sdk import WorkspaceClient  # noqa: PLC0415 - slow: see above
        from databricks.sdk.core import Config  # noqa: PLC0415

        # The settings have the SDK's own names, but for the file.
        given: dict[str, Any] = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name, value in self._settings
            if name != "client_secret_file"
        }
        if self._file_secret:
            given["client_secret"] = self._file_secret.reveal().decode()
        budget_seconds = max(1, int(self._timeout_seconds * _RETRY_PART))
        config = Config(
            clock=_impatient_clock(budget_seconds),
            product=_PRODUCT,
            product_version=self._version,
            http_timeout_seconds=min(_REQUEST_SECONDS_MAX, self._timeout_seconds),
            retry_timeout_seconds=budget_seconds,
            # What is not set is not passed: the SDK looks for it in its own places.
            **{name: value for name, value in given.items() if value},
        )
        return WorkspaceClient(config=config)


def _impatient_clock(sleep_seconds_max: float) -> "Clock":
    """Return a clock for the SDK, which gives up at once where it would sleep past its budget.

    A Retry-After may name any time. Slept through, it would end as a call that hangs, and nobody
    would hear that the API limits its calls.
    """
    from databricks.sdk.clock import RealClock  # noqa: PLC0415 - imported by now

    class ImpatientClock(RealClock):
        def sleep(self, seconds: float) -> None:
            if seconds > sleep_seconds_max + _SDK_JITTER_SECONDS_MAX:
                # It is handling the failure after which it wants to try again.
                raise TimeoutError(f"told to wait {seconds:.0f} seconds") from sys.exception()
            super().sleep(seconds)

    return ImpatientClock()


def _identity(client: "WorkspaceClient") -> Identity:
    config = client.config
    role = config.client_id or client.current_user.me().user_name
    if not role:
        detail = "the API names no user: set upstream.user"
        raise ProxyError(ErrorKind.CONFIGURATION_INVALID, detail)
    client.config.authenticate()  # with a client id nothing has been asked of the workspace yet
    return Identity(role, config.host or "", config.auth_type or "")


def _date(client: "WorkspaceClient") -> float | None:
    """Return what time it is there: the Date of a document that anybody may read."""
    reply = client.api_client.do("GET", "/.well-known/databricks-config", response_headers=["date"])
    text = reply.get("date") if isinstance(reply, dict) else None
    try:
        return parsedate_to_datetime(text).timestamp() if isinstance(text, str) else None
    except ValueError:
        return None


def _unauthenticated() -> type[Exception]:
    from databricks.sdk.errors import Unauthenticated  # noqa: PLC0415 - slow: see above

    return Unauthenticated


class _Row(NamedTuple):
    """One case: the exception's class, a piece of its text where that decides, what it means."""

    error: type[Exception]
    piece: str  # in lower case
    kind: ErrorKind


@cache
def _rows() -> tuple[_Row, ...]:
    """Return what the SDK fails with, the first row that fits being the one; all that is left is
    an API that cannot be reached: 5xx, time-outs, refused connections, replies that are not JSON.
    """
    from databricks.sdk import errors  # noqa: PLC0415 - imported by now

    kinds = ErrorKind
    return (
        # At any call, the login included, and in whatever form.
        _Row(Exception, "databricks ip acl", kinds.IP_BLOCKED),
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
        # The login and the SDK's own checks: bare ValueErrors, told apart by their text alone.
        # The words of a refused login are those of RFC 6749, section 5.2.
        _Row(ValueError, "invalid_client", kinds.WORKSPACE_LOGIN_FAILED),
        _Row(ValueError, "invalid_grant", kinds.WORKSPACE_LOGIN_FAILED),
        _Row(ValueError, "unauthorized_client", kinds.WORKSPACE_LOGIN_FAILED),
        _Row(ValueError, "cannot configure default credentials", kinds.CONFIGURATION_INVALID),
        _Row(ValueError, "more than one authorization", kinds.CONFIGURATION_INVALID),
        _Row(ValueError, "profile configured", kinds.CONFIGURATION_INVALID),
        _Row(Exception, "", kinds.API_UNREACHABLE),
    )


def _translate(error: Exception) -> ProxyError:
    """Return what an exception of the SDK means. Its text is not passed on whole.

    Messages of 401 and 403 carry the SDK's configuration; the secret in it is masked, but nothing
    of it belongs in front of a client.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return ProxyError(ErrorKind.OUT_OF_RESOURCES, os.strerror(error.errno))
    text = str(error).split(". Config:")[0].split("\n")[0][:_TEXT_CHARACTERS_MAX]
    lower = text.lower()
    if "invalid url 'none'" in lower:  # what becomes of discovery that failed
        text = "the workspace does not say where to log in"
    fitting = (row.kind for row in _rows() if isinstance(error, row.error) and row.piece in lower)
    retry_after_seconds = float(getattr(error, "retry_after_secs", None) or 0)
    return ProxyError(next(fitting), text, retry_after_seconds=retry_after_seconds)
