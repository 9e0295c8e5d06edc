"""An administrator's connections: to the catalogue, and to the shards of its maps.

For: opening them as `[catalogue]`, its target and `[upstream]` say, through the proxy's own dialer.
Not for: what is asked there. The rules of which hosts get tokens are those of the sidecar.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import asyncpg

from proxy import __version__
from proxy.catalogue.errors import CatalogueError, Reason, driver_errors, translated
from proxy.catalogue.model import Shard
from proxy.catalogue.schema import CATALOGUE
from proxy.catalogue.shard_store import quoted, reader_statements
from proxy.catalogue.shard_upstreams import ShardUpstreams
from proxy.config import ConfigurationError, Problem, Settings, UpstreamSettings
from proxy.errors import ProxyError
from proxy.server.metric_labels import build_metrics
from proxy.session.private_listener import PrivateListener
from proxy.upstream.address_lookup import ANY_USER
from proxy.upstream.connector import Connector
from proxy.upstream.upstreams import Upstream, Upstreams
from proxy.workspace.registry import LocalWorkspaceRegistry

_TARGET_KEY: Final = "catalogue.target"
_READER_HINT: Final = (
    "To read: "
    + "; ".join(reader_statements("ROLE")).replace(quoted("ROLE"), "{0}")
    + ". To change a map: log in as the owner of the schema."
)
_OWNER_HINT: Final = "Log in as the owner of the schema shardmap_local."


class Administration:
    """Opens connections for one run of a verb."""

    def __init__(self, settings: Settings, upstreams: Upstreams, private: PrivateListener) -> None:
        self.settings = settings
        self._upstreams = upstreams
        self._private = private
        resources = [(one.account_key, one.resource) for one in upstreams.values() if one.resource]
        self._shards = ShardUpstreams(settings, upstreams.factory, resources, self.catalogue_host)

    @asynccontextmanager
    async def catalogue(self) -> AsyncIterator[Any]:
        """Yield a connection to the catalogue.

        Raises CatalogueError for its own errors, and for those of asyncpg in the block.
        """
        async with (
            _translating(CATALOGUE),
            self._private.connect(self._target) as connection,
            _naming_role(connection, CATALOGUE, _READER_HINT),
        ):
            yield connection

    @asynccontextmanager
    async def shard(self, shard: Shard) -> AsyncIterator[Any]:
        """Yield a connection to a shard. Raises CatalogueError as `catalogue` does."""
        where = f"shard {shard.name}"
        async with _translating(where):
            upstream = await self._shards.of(shard)
            async with (
                self._private.connect(upstream) as connection,
                _naming_role(connection, where, _OWNER_HINT),
            ):
                yield connection

    @asynccontextmanager
    async def share(self, shard: Shard, path: Path) -> AsyncIterator[None]:
        """Serve a unix socket with sessions of a shard. Raises CatalogueError and OSError."""
        async with _translating(f"shard {shard.name}"):
            upstream = await self._shards.of(shard)
        async with self._private.share(upstream, path):
            yield

    async def catalogue_host(self) -> str:
        """Return the host of the catalogue. Raises ProxyError."""
        return (await self._target.address_lookup.target()).host

    async def check_shard(self, shard: Shard) -> None:
        """Check that a shard may be dialled; nothing is. Raises CatalogueError."""
        async with _translating(f"shard {shard.name}"):
            await self._shards.of(shard)

    async def host_of(self, settings: UpstreamSettings) -> str:
        """Return the host of an endpoint or an instance. Raises CatalogueError."""
        async with _translating("the workspace"):
            upstream = self._upstreams.factory.make(_NEW_SHARD, settings)
            with upstream.use:
                return (await upstream.address_lookup.target()).host

    async def close(self) -> None:
        """Close the upstreams of the shards."""
        self._shards.close()

    @property
    def _target(self) -> Upstream:
        return self._upstreams[self.settings.catalogue.target]


# The name of an upstream that serves one look-up.
_NEW_SHARD: Final = "new shard"


@asynccontextmanager
async def administering(settings: Settings) -> AsyncIterator[Administration]:
    """Yield what opens connections while the block runs.

    Raises ConfigurationError for files that settings name and that cannot be used.
    """
    settings = _as_one_identity(settings)
    async with AsyncExitStack() as stack:
        registry = LocalWorkspaceRegistry(build_metrics(), version=__version__)
        stack.push_async_callback(registry.close)
        upstreams = Upstreams(settings, registry, lambda *_: None)
        listener = PrivateListener.of_verb(
            Connector(upstreams.name_lookup.resolve), build_metrics()
        )
        private = await stack.enter_async_context(listener)
        administration = Administration(settings, upstreams, private)
        stack.push_async_callback(administration.close)
        yield administration


def check_target(settings: Settings) -> None:
    """Raise ConfigurationError if the settings do not say where the catalogue is."""
    if not settings.catalogue.target:
        text = "required: the [targets.NAME] that has the catalogue, with an administrator's role"
        raise ConfigurationError([Problem(_TARGET_KEY, text)])


def _as_one_identity(settings: Settings) -> Settings:
    """Return settings without a user that each client names: an administrator has one identity."""

    def section(target: UpstreamSettings) -> UpstreamSettings:
        return target.model_copy(update={"user": ""}) if target.user == ANY_USER else target

    targets = {name: section(target) for name, target in settings.targets.items()}
    return settings.model_copy(update={"upstream": section(settings.upstream), "targets": targets})


@asynccontextmanager
async def _translating(where: str) -> AsyncIterator[None]:
    try:
        yield
    except driver_errors(ProxyError) as error:
        raise translated(error, where) from error


@asynccontextmanager
async def _naming_role(connection: Any, where: str, hint: str) -> AsyncIterator[None]:
    """Name the role that lacks a right, and in `hint` how it gets it."""
    try:
        yield
    except asyncpg.InsufficientPrivilegeError as error:
        role = ""
        with suppress(*driver_errors()):
            role = await connection.fetchval("select current_user::text")
        text = f"{where}: {error} (the role is {role})"
        raise CatalogueError(Reason.RIGHTS_MISSING, text, hint.format(quoted(role))) from error
