"""The calls to a Databricks workspace: our identity, the host of an endpoint, credentials.

The SDK's calls block and raise many exceptions: they run in threads under `mint_timeout_seconds`,
and fail with ProxyError. Its replies may lack any field and hold anything, so that their values are
validated before they are passed on. What the settings leave out is left to the SDK's own discovery
(environment, profile, projected tokens), except for a named workspace.

For: the calls, and the client that they share. Not for: how the client is made (`sdk_client`), the
time limits of its requests (`sdk_http`), or what its failures mean (`sdk_errors`).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeVar

from pydantic import SecretStr

from proxy.blocking import BlockingCalls, NoThreadFree, NoThreadStarted
from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.listing import Listed, list_inside
from proxy.workspace.login_settings import check_root_cert, proxy_secrets, read_secret_file
from proxy.workspace.resources import Instance, Minted, Resource, ResourceStatus
from proxy.workspace.sdk_client import connect
from proxy.workspace.sdk_errors import is_login_refused, translate
from proxy.workspace.sdk_http import bounded_requests
from proxy.workspace.sdk_import import WorkspaceClient

T = TypeVar("T")

# A token seems to expire sooner than any may be requested for, or to live longer than any: this
# machine's clock is wrong, if the server's time says so too.
_TOKEN_SECONDS_MIN: Final = 300.0
_TOKEN_SECONDS_MAX: Final = 3600.0
_CLOCK_AHEAD_SECONDS_MAX: Final = 60.0
# As far as a clock may be ahead until no token is of use. Logins work with a clock that is behind,
# but expired tokens are sent when the API fails, and certificates seem not to be valid yet.
_CLOCK_BEHIND_SECONDS_MAX: Final = _TOKEN_SECONDS_MAX - _TOKEN_SECONDS_MIN

# An instance has error kinds of its own: the hints for an endpoint do not apply.
_INSTANCE_KINDS: Final = {
    ErrorKind.ENDPOINT_NOT_FOUND: ErrorKind.INSTANCE_NOT_FOUND,
    ErrorKind.ENDPOINT_INVALID: ErrorKind.INSTANCE_INVALID,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """The role of a token: the client id of a service principal, or a person's user name."""

    role: str
    host: str
    auth_type: str


class WorkspaceSource(Protocol):
    """What is asked of a workspace, in this process or through the supervisor."""

    async def status(self, resource: Resource) -> ResourceStatus:
        """Return state and host of a resource. Raises ProxyError."""

    async def identity(self) -> Identity:
        """Return the proxy's identity there. Raises ProxyError."""

    async def clock_ahead_seconds(self) -> float | None:
        """Return how far this machine's clock is ahead of the workspace's, None if unknown."""


class Workspace:
    """One workspace and one identity in it."""

    def __init__(
        self,
        settings: WorkspaceSettings,
        credentials: CredentialsSettings,
        *,
        version: str,
        discover: bool = True,
        retries: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Without `discover`, log in with the settings, and the profile that they name, alone.

        Without `retries`, report a connection that fails at once. `clock` returns seconds since the
        epoch.
        """
        self._settings = settings
        self._timeout_seconds = credentials.mint_timeout_seconds
        self._version = version
        self._discover = discover
        self._retries = retries
        self._clock = clock
        self._blocking_calls = BlockingCalls("databricks-sdk")
        self._client: WorkspaceClient | None = None
        self._generation = object()  # a new one each time the client is dropped
        self._file_secret: Secret | None = None
        self._ahead_seconds: float | None = None  # this clock before the server's, at the last call

    async def mint(self, resource: Resource) -> Credential:
        """Return a new database credential. Raises ProxyError."""
        requested_at = self._clock()
        minted = await self._call_about(resource, resource.mint)
        self._check_clock(minted)
        return _credential(minted, requested_at, self._clock())

    async def status(self, resource: Resource) -> ResourceStatus:
        """Return state and host of a resource. Raises ProxyError."""
        return await self._call_about(resource, resource.status)

    async def identity(self) -> Identity:
        """Return our identity, by a call that the workspace must accept. Raises ProxyError."""
        return await self._call(_identity)

    async def list_inside(self, parent: str) -> list[Listed]:
        """Return the projects, or what the project or branch `parent` has. Raises ProxyError."""
        return await self._call(partial(list_inside, parent=parent))

    async def clock_ahead_seconds(self) -> float | None:
        """Return how far this machine's clock is ahead of the workspace's, to about a second.

        None if the workspace does not say. Raises ProxyError.
        """
        await self._call(_discovery)
        return self._ahead_seconds

    def _check_clock(self, minted: Minted) -> None:
        """Raise ProxyError if a new token is dated by a clock that is far from this machine's."""
        ahead_seconds = self._ahead_seconds
        if ahead_seconds is None or minted.expires_at is None:
            return
        lifetime_seconds = minted.expires_at - self._clock()
        is_ahead = ahead_seconds >= _CLOCK_AHEAD_SECONDS_MAX
        if is_ahead and -ahead_seconds < lifetime_seconds < _TOKEN_SECONDS_MIN:
            detail = f"it is {ahead_seconds:.0f} s ahead of the workspace's"
            raise ProxyError(ErrorKind.CLOCK_OFF, detail)
        if ahead_seconds < -_CLOCK_BEHIND_SECONDS_MAX and lifetime_seconds > _TOKEN_SECONDS_MAX:
            detail = f"it is {-ahead_seconds:.0f} s behind the workspace's"
            raise ProxyError(ErrorKind.CLOCK_OFF, detail)

    async def _call_about(self, resource: Resource, call: Callable[[WorkspaceClient], T]) -> T:
        """Make a call that names a resource. Raises ProxyError."""
        try:
            return await self._call(call)
        except ProxyError as error:
            kind = _INSTANCE_KINDS.get(error.kind)
            if kind is None or not isinstance(resource, Instance):
                raise
            raise ProxyError(kind, error.detail) from None

    async def _call(self, call: Callable[[WorkspaceClient], T]) -> T:
        generation = self._generation
        try:
            outcome = await self._blocking_calls.run(
                lambda: self._outcome(call), self._timeout_seconds
            )
        except NoThreadStarted as error:
            raise ProxyError(ErrorKind.OUT_OF_RESOURCES, str(error)) from error
        except NoThreadFree as error:
            raise ProxyError(ErrorKind.API_UNREACHABLE, str(error)) from None
        except TimeoutError as error:
            # The call may hold a lock of this client: abandon both.
            self._drop_client(generation)
            detail = f"no answer within {self._timeout_seconds:g} seconds"
            raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from error
        if isinstance(outcome, ProxyError):
            if outcome.kind is ErrorKind.WORKSPACE_LOGIN_FAILED:
                self._drop_client(generation)  # it would keep the refused workspace token
            raise outcome
        return outcome

    def _outcome(self, call: Callable[[WorkspaceClient], T]) -> T | ProxyError:
        """Make the call, which blocks, in a thread.

        A failure is returned, not raised: the SDK's exception may hold a secret and is dropped.
        """
        ca_file = self._settings.ssl_root_cert
        with bounded_requests(self._timeout_seconds, ca_file, retries=self._retries) as sdk_call:
            try:
                return self._call_client(call)
            except ProxyError as error:
                return error
            except ImportError as error:
                return ProxyError(ErrorKind.INTERNAL, f"databricks-sdk cannot be used: {error}")
            except Exception as error:
                return translate(error, sdk_call, self._secrets())
            finally:
                there = sdk_call.server_time
                self._ahead_seconds = None if there is None else self._clock() - there

    def _call_client(self, call: Callable[[WorkspaceClient], T]) -> T:
        """Call with the present client, or a new one."""
        if self._settings.ssl_root_cert:
            check_root_cert(self._settings.ssl_root_cert)
        self._read_secret_file()
        client, generation = self._client, self._generation
        if client is not None:
            try:
                return call(client)
            except Exception as error:
                if not is_login_refused(error):  # the workspace token may have expired
                    raise
        client = self._new_client()
        # Two threads may make one each. The later one is kept, unless the client was dropped since.
        if generation is self._generation:
            self._client = client
        return call(client)

    def _new_client(self) -> WorkspaceClient:
        return connect(
            self._settings,
            self._file_secret,
            version=self._version,
            timeout_seconds=self._timeout_seconds,
            discover=self._discover,
            retries=self._retries,
        )

    def _drop_client(self, generation: object) -> None:
        """Drop the client of this generation; a late call must not drop a newer one."""
        if generation is self._generation:
            self._client, self._generation = None, object()

    def _read_secret_file(self) -> None:
        """Read `client_secret_file` again; a rotated secret makes a new client."""
        if not self._settings.client_secret_file:
            return
        secret = Secret(read_secret_file(self._settings.client_secret_file).encode())
        if secret != self._file_secret:
            self._file_secret = secret
            self._drop_client(self._generation)

    def _secrets(self) -> list[str]:
        settings = (value for _name, value in self._settings)
        given = [value.get_secret_value() for value in settings if isinstance(value, SecretStr)]
        file_secret = [self._file_secret.reveal().decode()] if self._file_secret else []
        return [*given, *file_secret, *proxy_secrets(os.environ)]


def _credential(minted: Minted, requested_at: float, now: float) -> Credential:
    """Return a credential that can be sent. Raises ProxyError."""
    token, expires_at = minted.token, minted.expires_at
    if not token or expires_at is None:
        raise ProxyError(ErrorKind.CREDENTIAL_INVALID, "the reply has no token or no expiry")
    if not isinstance(token, str) or not (token.isascii() and token.isprintable()):
        # A NUL would end the PasswordMessage, and only text can be sent at all.
        raise ProxyError(ErrorKind.CREDENTIAL_INVALID, "the token is not printable ASCII")
    if expires_at <= now:
        raise ProxyError(ErrorKind.CREDENTIAL_INVALID, "the token has already expired")
    return Credential(Secret(token.encode()), requested_at, expires_at)


def _identity(client: WorkspaceClient) -> Identity:
    config = client.config
    role: object = config.client_id or client.current_user.me().user_name
    if not role:
        detail = "the API does not name a user: set upstream.user"
        raise ProxyError(ErrorKind.CONFIGURATION_INVALID, detail)
    if not isinstance(role, str) or not role.isprintable():
        raise ProxyError(ErrorKind.API_REPLY_INVALID, "the user's name is not printable text")
    client.config.authenticate()  # with a client id there was no call to the workspace yet
    return Identity(role, config.host or "", config.auth_type or "")


def _discovery(client: WorkspaceClient) -> None:
    """Request a document that needs no permission, for the time of its reply."""
    client.api_client.do("GET", "/.well-known/databricks-config")
