"""Where to dial and as whom: from the settings and the workspace's answers to a Target."""

import asyncio
from dataclasses import dataclass

from proxy.config import UpstreamSettings
from proxy.errors import ProxyError
from proxy.upstream.workspace import Workspace
from proxy.wire.startup import StartupMessage

ANY_USER = "*"


@dataclass(frozen=True, slots=True)
class Target:
    """Where to dial. `host` is what TLS verifies and SNI names, `hostaddr` what is dialled."""

    host: str
    hostaddr: str
    port: int
    sslmode: str
    ssl_root_cert: str


@dataclass(frozen=True, slots=True)
class Login:
    """As whom, and into which database."""

    user: bytes
    database: bytes


class Targets:
    """Works out targets; what it learns from the workspace it keeps until `forget_host`.

    A host that was forgotten still serves when the workspace cannot say a newer one.
    """

    def __init__(self, settings: UpstreamSettings, workspace: Workspace) -> None:
        self._settings = settings
        self._workspace = workspace
        self._host = settings.host
        self._host_is_current = bool(settings.host)
        self._user = settings.user
        # Connections that arrive together wait for one answer of the workspace.
        self._asking = asyncio.Lock()

    async def target(self) -> Target:
        """Return where to dial. Raises ProxyError when the workspace does not say."""
        settings = self._settings
        host = self._host if self._host_is_current else await self._looked_up_host()
        return Target(
            host, settings.hostaddr, settings.port, settings.sslmode, settings.ssl_root_cert
        )

    async def login(self, client: StartupMessage) -> Login:
        """Return as whom this client logs in, and where. Raises ProxyError.

        A database that equals the client's user is what drivers send for "none given" (W16).
        """
        asked_user = client.get(b"user") or b""
        asked_database = client.get(b"database") or asked_user
        database = self._settings.database.encode()
        if asked_database != asked_user:
            database = asked_database
        if self._settings.user == ANY_USER:
            return Login(asked_user, database)
        async with self._asking:
            if not self._user:
                self._user = await self._workspace.identity()
        return Login(self._user.encode(), database)

    async def _looked_up_host(self) -> str:
        async with self._asking:
            if not self._host_is_current:
                try:
                    self._host = await self._workspace.endpoint_host(self._settings.endpoint)
                except ProxyError:
                    if not self._host:
                        raise
                self._host_is_current = True
            return self._host

    def forget_host(self) -> None:
        """Look the host up again next time: a dial to it failed. A configured host stays."""
        self._host_is_current = bool(self._settings.host)
