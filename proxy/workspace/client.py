"""The calls to a Databricks workspace: our identity, the host of an endpoint, credentials.

The SDK's calls block and raise many exceptions: they run in threads under `mint_timeout_seconds`,
and fail with ProxyError. Its replies may lack any field and hold anything, so that their values are
validated before they are passed on. What the settings leave out is left to the SDK's own discovery
(environment, profile, projected tokens), except for a named workspace.

For: the calls, and the client that they share. Not for: how the client is made (`sdk_client`), the
time limits of its requests (`sdk_http`), or what its failures mean (`sdk_errors`).
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import SecretStr

from proxy.blocking import BlockingCalls, NoThreadFree
from proxy.config import CredentialsSettings, WorkspaceSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workspace.credential import Credential
from proxy.workspace.resources import Minted, Resource, ResourceStatus
from proxy.workspace.sdk_client import connect
from proxy.workspace.sdk_errors import translate
from proxy.workspace.sdk_http import bounded_requests
from proxy.workspace.sdk_import import WorkspaceClient

T = TypeVar("T")


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
        """Return who we are there. Raises ProxyError."""

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
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Without `discover`, log in with the settings, and the profile that they name, alone.

        `clock` returns seconds since the epoch.
        """
        self._settings = settings
        self._timeout_seconds = credentials.mint_timeout_seconds
        self._version = version
        self._discover = discover
        self._clock = clock
        self._blocking_calls = BlockingCalls("databricks-sdk")
        self._client: WorkspaceClient | None = None
        self._generation = object()  # a new one each time the client is dropped
        self._file_secret: Secret | None = None

    async def mint(self, resource: Resource) -> Credential:
        """Return a new database credential. Raises ProxyError."""
        requested_at = self._clock()
        return _credential(await self._call(resource.mint), requested_at, self._clock())

    async def status(self, resource: Resource) -> ResourceStatus:
        """Return state and host of a resource. Raises ProxyError."""
        return await self._call(resource.status)

    async def identity(self) -> Identity:
        """Return our identity, by a call that the workspace must accept. Raises ProxyError."""
        return await self._call(_identity)

    async def clock_ahead_seconds(self) -> float | None:
        """Return how far this machine's clock is ahead of the workspace's, to about a second.

        None if the workspace does not say. Raises ProxyError.
        """
        there = await self._call(_date)
        return None if there is None else self._clock() - there

    async def _call(self, call: Callable[[WorkspaceClient], T]) -> T:
        generation = self._generation
        try:
            outcome = await self._blocking_calls.run(
                lambda: self._outcome(call), self._timeout_seconds
            )
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
        with bounded_requests(self._timeout_seconds, self._settings.ssl_root_cert) as sdk_call:
            try:
                return self._call_client(call)
            except ProxyError as error:
                return error
            except ImportError as error:
                return ProxyError(ErrorKind.INTERNAL, f"databricks-sdk cannot be used: {error}")
            except Exception as error:
                return translate(error, sdk_call, self._secrets())

    def _call_client(self, call: Callable[[WorkspaceClient], T]) -> T:
        """Call with the present client, or a new one."""
        self._read_secret_file()
        client, generation = self._client, self._generation
        if client is not None:
            with suppress(_unauthenticated()):  # the workspace token that it keeps may have expired
                return call(client)
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
        )

    def _drop_client(self, generation: object) -> None:
        """Drop the client of this generation; a late call must not drop a newer one."""
        if generation is self._generation:
            self._client, self._generation = None, object()

    def _read_secret_file(self) -> None:
        """Read `client_secret_file` again; a rotated secret makes a new client."""
        if not self._settings.client_secret_file:
            return
        try:
            secret = Secret(Path(self._settings.client_secret_file).read_bytes().strip())
            secret.reveal().decode()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "the file is not UTF-8"
            detail = f"workspace.client_secret_file: {why}"
            raise ProxyError(ErrorKind.CONFIGURATION_INVALID, detail) from None
        if not secret:  # the SDK would look for a secret elsewhere
            detail = "workspace.client_secret_file: the file is empty"
            raise ProxyError(ErrorKind.CONFIGURATION_INVALID, detail)
        if secret != self._file_secret:
            self._file_secret = secret
            self._drop_client(self._generation)

    def _secrets(self) -> list[str]:
        settings = (value for _name, value in self._settings)
        given = [value.get_secret_value() for value in settings if isinstance(value, SecretStr)]
        return given + ([self._file_secret.reveal().decode()] if self._file_secret else [])


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


def _date(client: WorkspaceClient) -> float | None:
    """Return the workspace's time: the Date of a document that needs no permission."""
    reply = client.api_client.do("GET", "/.well-known/databricks-config", response_headers=["date"])
    text = reply.get("date") if isinstance(reply, dict) else None
    try:
        return parsedate_to_datetime(text).timestamp() if isinstance(text, str) else None
    except ValueError:
        return None


def _unauthenticated() -> type[Exception]:
    from databricks.sdk.errors import Unauthenticated  # noqa: PLC0415 - slow

    return Unauthenticated
