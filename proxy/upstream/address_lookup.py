"""Where to dial and as whom: from the settings and the workspace's answers to a Target."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from proxy.config import UpstreamSettings
from proxy.config.validators import check_host
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.startup import StartupMessage
from proxy.workspace.client import WorkspaceSource
from proxy.workspace.resources import Resource, ResourceStatus
from proxy.workspace.single_flight import Backoff, SingleFlight

ANY_USER = "*"

# A host that is known but may have moved is asked for again no longer than this.
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


@dataclass(frozen=True, slots=True)
class LoginNames:
    """As whom, and into which database."""

    user: bytes
    database: bytes


class AddressLookup:
    """Works out targets. What the workspace answered is kept until `invalidate_host`."""

    def __init__(
        self,
        settings: UpstreamSettings,
        resource: Resource | None,
        workspace: WorkspaceSource,
        *,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`jitter` returns a number from 0 to 1."""
        self._settings = settings
        self._resource = resource
        self._workspace = workspace
        self._host = settings.host
        self._stale = False
        self._user = settings.user
        # Connections that arrive together wait for one answer of the workspace.
        self._look_up = SingleFlight(self._ask_host)
        self._identify = SingleFlight(self._ask_user)
        # After a failure, or an answer that was no news, nobody asks for a while: a thousand
        # clients dial a database that sleeps again and again.
        self._host_backoff = Backoff(clock, jitter)
        self._user_backoff = Backoff(clock, jitter)
        self._sleep = sleep

    async def close(self) -> None:
        """End what is being asked of the workspace."""
        await self._look_up.close()
        await self._identify.close()

    @property
    def host(self) -> str:
        """The host as it is known now, empty before it was looked up; for those who show it."""
        return self._host

    async def target(self) -> Target:
        """Return where to dial. Raises ProxyError when the workspace does not say."""
        if self._host:
            if self._stale and not self._host_backoff.remaining_seconds:
                await self._look_up_again()
        else:
            await self._first_look_up()
        settings = self._settings
        return Target(
            self._host,
            settings.hostaddr,
            settings.port,
            settings.sslmode,
            settings.ssl_root_cert,
            settings.accelerated,
        )

    async def login_names(self, client: StartupMessage) -> LoginNames:
        """Return as whom this client logs in, and where: without a database, the target's own.

        Raises ProxyError.
        """
        asked_user = client.get(b"user") or b""
        database = client.get(b"database") or self._settings.database.encode()
        if self._settings.user == ANY_USER:
            return LoginNames(asked_user, database)
        if not self._user:
            await self._first_identify()
        return LoginNames(self._user.encode(), database)

    def invalidate_host(self) -> None:
        """Look the host up again next time: a dial to it failed. A configured host stays."""
        self._stale = not self._settings.host

    async def _first_look_up(self) -> None:
        await self._host_backoff.wait(self._sleep)
        if not self._host:  # nobody has found out meanwhile
            await self._look_up.result()

    async def _look_up_again(self) -> None:
        """Look up a host that is known, for a while; then the known one serves."""
        try:
            async with asyncio.timeout(LOOK_UP_SECONDS_MAX):
                await self._look_up.result()
        except TimeoutError:
            self._host_backoff.start()

    async def _ask_host(self) -> None:
        assert self._resource is not None, "settings without a host name a resource"
        try:
            status = await self._workspace.status(self._resource)
        except ProxyError as error:
            self._host_backoff.start(error)
            if self._host:
                return  # a failure of the API shall not cost a host that is known
            raise
        try:
            host = _host_in(status, self._resource.name)
        except ProxyError as error:
            self._host_backoff.start(error)
            raise
        if host == self._host:
            self._host_backoff.start()
        else:
            self._host_backoff.reset()
        self._host, self._stale = host, False

    async def _first_identify(self) -> None:
        await self._user_backoff.wait(self._sleep)
        if not self._user:  # as above
            await self._identify.result()

    async def _ask_user(self) -> None:
        try:
            identity = await self._workspace.identity()
        except ProxyError as error:
            self._user_backoff.start(error)
            raise
        self._user_backoff.reset()
        self._user = identity.role


def _host_in(status: ResourceStatus, name: str) -> str:
    """Return the host that the API names. Raises ProxyError when there is none to dial."""
    if status.disabled:
        raise ProxyError(ErrorKind.ENDPOINT_DISABLED, name)
    if not status.host:
        detail = f"the API names no host for {name} ({status.state})"
        raise ProxyError(ErrorKind.UPSTREAM_STARTING, detail)
    try:
        return check_host(status.host if isinstance(status.host, str) else "")
    except ValueError as error:
        detail = f"the host that the API names for {name} {error}"
        raise ProxyError(ErrorKind.API_REPLY_INVALID, detail) from None
