"""Where to dial and as whom: a target's host and role, from the settings or the workspace.

For: keeping what the workspace answered, and asking again when it may be outdated. Not for: DNS
(`connector`), or credentials (`workspace.token_source`).
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from proxy.addresses import is_pooled_host
from proxy.config import UpstreamSettings
from proxy.config.validators import check_host
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.startup import StartupMessage
from proxy.workspace.client import WorkspaceSource
from proxy.workspace.outage import ApiCall, Outage
from proxy.workspace.resources import Resource, ResourceStatus
from proxy.workspace.single_flight import Backoff, PendingCalls, SingleFlight

ANY_USER = "*"

# A host that is known and may be outdated is looked up again for no longer than this.
LOOK_UP_SECONDS_MAX: Final = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where to dial. `host` is what TLS verifies and SNI names, `hostaddr` what is dialled."""

    host: str
    hostaddr: str
    port: int
    sslmode: str
    ssl_root_cert: str
    accelerated: bool = True

    @property
    def server_name(self) -> str:
        """The name for SNI and for the certificate: the host without a trailing dot (RFC 6066)."""
        return self.host.removesuffix(".")

    @property
    def pooled(self) -> bool:
        """Whether it is a connection pooler's host."""
        return is_pooled_host(self.host)


@dataclass(frozen=True, slots=True)
class LoginNames:
    """The user and the database of a login."""

    user: bytes
    database: bytes


class AddressLookup:
    """The address of one target. What the workspace answered is kept until `invalidate_host`."""

    def __init__(
        self,
        settings: UpstreamSettings,
        resource: Resource | None,
        workspace: WorkspaceSource,
        pending: PendingCalls,
        *,
        outage: Outage | None = None,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`pending` is the owner's, who closes it. `jitter` returns a number from 0 to 1."""
        self._settings = settings
        self._resource = resource
        self._workspace = workspace
        self._target = _target(settings, settings.host)
        self._stale = False
        self.outage = outage or Outage("workspace", clock)
        self._user = settings.user
        # Connections that arrive together wait for one answer of the workspace.
        self._host_call = SingleFlight(self._ask_host, pending)
        self._user_call = SingleFlight(self._ask_user, pending)
        # After a failure, or an answer with nothing new in it, there is no call for some time: a
        # thousand clients dial a sleeping database again and again.
        self._host_backoff = Backoff(clock, jitter)
        self._user_backoff = Backoff(clock, jitter)
        self._sleep = sleep

    @property
    def host(self) -> str:
        """The host as it is known now; empty before the first look-up."""
        return self._target.host

    @property
    def role(self) -> str:
        """The role as it is known now; empty before the first look-up, or `ANY_USER`."""
        return self._user

    def keep_role(self, role: str) -> None:
        """Keep the identity's role, which the workspace has named to another process."""
        self._user = self._user or role

    @property
    def known_target(self) -> Target | None:
        """The target by what is known now; None before the first look-up."""
        return self._target if self._target.host else None

    @property
    def api_failure(self) -> ProxyError | None:
        """The present failure of the workspace API; None while it works."""
        failure = self.outage.failure
        return None if failure is None else ProxyError(failure.kind, failure.detail)

    async def target(self) -> Target:
        """Return where to dial. Raises ProxyError when the workspace does not name a host."""
        if not self.host:
            await self._look_up_host()
        elif self._stale and not self._host_backoff.remaining_seconds:
            await self._refresh_host()
        return self._target

    async def login_names(self, client: StartupMessage) -> LoginNames:
        """Return user and database for this client; without a database, the target's own.

        Raises ProxyError.
        """
        if not self._user:
            await self._look_up_user()
        return self._names(client)

    def known_names(self, client: StartupMessage) -> LoginNames | None:
        """Return the same by what is known now; None where the role is not known yet."""
        return self._names(client) if self._user else None

    def _names(self, client: StartupMessage) -> LoginNames:
        database = client.get(b"database") or self._settings.database.encode()
        if self._settings.user == ANY_USER:
            return LoginNames(client.get(b"user") or b"", database)
        return LoginNames(self._user.encode(), database)

    def invalidate_host(self) -> None:
        """Look the host up again next time: a dial to it failed. A configured host stays."""
        self._stale = not self._settings.host

    async def _look_up_host(self) -> None:
        refusal = self.outage.refusal()
        if refusal is not None:
            if not self._host_backoff.remaining_seconds:
                self._host_call.start()  # its outcome is for the next client
            raise refusal
        await self._host_backoff.wait(self._sleep)
        if not self.host:  # it may have been found meanwhile
            await self._host_call.result()

    async def _refresh_host(self) -> None:
        """Look up a host that is known, for a limited time; after that the known one is used."""
        try:
            async with asyncio.timeout(LOOK_UP_SECONDS_MAX):
                await self._host_call.result()
        except TimeoutError:
            self._host_backoff.start()

    async def _ask_host(self) -> None:
        assert self._resource is not None, "settings without a host name a resource"
        try:
            status = await self._workspace.status(self._resource)
        except ProxyError as error:
            self._host_backoff.start(error)
            self.outage.record_failure(ApiCall.LOOK_UP, error, self._host_backoff.remaining_seconds)
            if self.host:
                return  # while the API fails, the known host is used
            raise
        self.outage.record_success(ApiCall.LOOK_UP)
        self._keep_host(status, self._resource.name)

    def _keep_host(self, status: ResourceStatus, name: str) -> None:
        """Keep the host that the API names. Raises ProxyError when there is none to dial."""
        try:
            host = _host_in(status, name)
        except ProxyError as error:
            self._host_backoff.start(error)
            raise
        if host == self.host:
            self._host_backoff.start()
        else:
            self._host_backoff.reset()
            self._target = _target(self._settings, host)
        self._stale = False

    async def _look_up_user(self) -> None:
        refusal = self.outage.refusal()
        if refusal is not None:
            if not self._user_backoff.remaining_seconds:
                self._user_call.start()  # its outcome is for the next client
            raise refusal
        await self._user_backoff.wait(self._sleep)
        if not self._user:  # it may have been found meanwhile
            await self._user_call.result()

    async def _ask_user(self) -> None:
        try:
            identity = await self._workspace.identity()
        except ProxyError as error:
            self._user_backoff.start(error)
            self.outage.record_failure(
                ApiCall.IDENTITY, error, self._user_backoff.remaining_seconds
            )
            raise
        self.outage.record_success(ApiCall.IDENTITY)
        self._user_backoff.reset()
        self._user = identity.role


def _target(settings: UpstreamSettings, host: str) -> Target:
    return Target(
        host,
        settings.hostaddr,
        settings.port,
        settings.sslmode,
        settings.ssl_root_cert,
        settings.accelerated,
    )


def _host_in(status: ResourceStatus, name: str) -> str:
    """Return the host that the API names. Raises ProxyError when there is none to dial."""
    if status.disabled:
        raise ProxyError(ErrorKind.ENDPOINT_DISABLED, name)
    if not status.host:
        detail = f"the API does not name a host for {name} ({status.state})"
        raise ProxyError(ErrorKind.UPSTREAM_STARTING, detail)
    try:
        return check_host(status.host if isinstance(status.host, str) else "")
    except ValueError as error:
        detail = f"the host that the API names for {name} {error}"
        raise ProxyError(ErrorKind.API_REPLY_INVALID, detail) from None
