"""The upstreams of a map's shards, each made when a session needs it first.

For: what a shard's row gives to its dials, and where tokens may go. Not for: which shard has a key
(`map_source`), or admission (`admitting_opener`).

The invariants: a row that cannot be right, a host outside `catalogue.shard_hosts` or a workspace
that is not configured is refused before anything is minted or dialled; an upstream never changes,
so that no token of one workspace meets a host of another. A row that changes gets a new one.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from proxy.addresses import is_pooled_host
from proxy.catalogue.model import Shard
from proxy.catalogue.shard_hosts import is_allowed
from proxy.config import Settings, UpstreamSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.upstreams import Upstream, UpstreamFactory
from proxy.workspace.registry import AccountKey, TokenAccount
from proxy.workspace.resources import Resource, resource_of

_Row = tuple[str, str, int, str, str, str, str]

TARGET_SEPARATOR: Final = "/"
# Of an endpoint or an instance, or empty. The name is a part of paths in the workspace's API: who
# can write the catalogue must not choose these.
_RESOURCE: Final = re.compile(r"[A-Za-z0-9_-]*(/[A-Za-z0-9_-]+)*")


def target_name(map_name: str, shard: Shard) -> str:
    """Return the name under which a shard is logged and counted: no target can have it."""
    return f"{map_name}{TARGET_SEPARATOR}{shard.name}"


@dataclass(frozen=True, slots=True)
class _Made:
    row: _Row
    upstream: Upstream
    use: ExitStack


class ShardUpstreams:
    """The upstreams of one configuration's shards. `close` them when it is replaced."""

    def __init__(
        self,
        settings: Settings,
        factory: UpstreamFactory,
        resources: Iterable[tuple[AccountKey, Resource]],
        catalogue_host: Callable[[], Awaitable[str]],
        before: "ShardUpstreams | None" = None,
    ) -> None:
        """`resources` are those of the configured targets: a token for one is good for others.

        `catalogue_host` returns the host of the catalogue; it raises ProxyError. `before` are the
        upstreams of the configuration that is replaced: those that would be the same are kept.
        """
        self._settings = settings
        self._factory = factory
        self._catalogue_host = catalogue_host
        self.map_name = settings.catalogue_map
        self._resources: dict[AccountKey, dict[str, Resource]] = {}
        for key, resource in resources:
            self._resources.setdefault(key, {}).setdefault(resource.name, resource)
        self._made: dict[UUID, _Made] = {}
        self._closed = False
        if before is not None and before.map_name == self.map_name:
            before.give_to(self)

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[tuple[str, Upstream]]:
        """Yield the name and the upstream of each shard that is in use."""
        for made in self._made.values():
            yield f"{self.map_name}{TARGET_SEPARATOR}{made.row[0]}", made.upstream

    @property
    def accounts(self) -> list[TokenAccount]:
        """The accounts in use, each once."""
        accounts = dict.fromkeys(made.upstream.account for made in self._made.values())
        return [account for account in accounts if account is not None]

    async def of(self, shard: Shard) -> Upstream:
        """Return the upstream of a shard. Raises ProxyError for one that may not be dialled."""
        made, row = self._made.get(shard.shard_id), _row(shard)
        if made is not None and made.row == row:
            return made.upstream
        settings = await self._settings_of(shard)
        made = self._made.get(shard.shard_id)  # another session may have made it meanwhile
        if made is not None and made.row == row:
            return made.upstream
        return self._make(shard, row, settings)

    def keep_only(self, shard_ids: Iterable[UUID]) -> None:
        """Close the upstreams of all other shards, which the map has no more."""
        for shard_id in self._made.keys() - set(shard_ids):
            self.discard(shard_id)

    def discard(self, shard_id: UUID) -> None:
        """Close the upstream of a shard. A dial under way goes on."""
        made = self._made.pop(shard_id, None)
        if made is not None:
            made.use.close()

    def give_to(self, later: "ShardUpstreams") -> None:
        """Pass another configuration the upstreams that it would make in the same way."""
        for shard_id, made in self._made.items():
            later.take(shard_id, made.row, made.upstream)

    def take(self, shard_id: UUID, row: _Row, upstream: Upstream) -> None:
        """Keep an upstream of the configuration before, if this one would make the same."""
        workspace = row[-1]
        if workspace and workspace not in self._settings.workspaces:
            return
        settings = _given(row, self._settings).inheriting(self._settings.upstream)
        key = self._factory.account_key(settings)
        if settings != upstream.settings or key != upstream.account_key:
            return
        if upstream.resource is not None:
            known = self._resources.setdefault(key, {})
            known.setdefault(upstream.resource.name, upstream.resource)
        self._add(shard_id, row, upstream)
        self._offer(key, upstream.account)

    def close(self) -> None:
        """Close what no other configuration and no dial uses; the rest after its last use.

        A client that is still parked may want one after that; it is kept for its dial only.
        """
        self._closed = True
        self.keep_only(())

    # -- inside ----------------------------------------------------------------------------------

    async def _settings_of(self, shard: Shard) -> UpstreamSettings:
        """Return the settings of a shard's dials. Raises ProxyError."""
        if shard.workspace and shard.workspace not in self._settings.workspaces:
            raise ProxyError(ErrorKind.WORKSPACE_UNKNOWN, self._shown(shard))
        patterns = self._settings.catalogue.shard_host_patterns
        own = "" if patterns else await self._catalogue_host()
        if not is_allowed(shard.host, patterns, own):
            raise ProxyError(ErrorKind.SHARD_HOST_REFUSED, self._shown(shard))
        try:
            given = _given(_row(shard), self._settings)
        except ValueError:
            detail = f"{self._shown(shard)}: its host, port, database or resource cannot be right"
            raise ProxyError(ErrorKind.SHARD_ROW_INVALID, detail) from None
        if is_pooled_host(shard.host):
            detail = f"{self._shown(shard)}: a pooler's host registers no session"
            raise ProxyError(ErrorKind.SHARD_ROW_INVALID, detail)
        return given.inheriting(self._settings.upstream)

    def _make(self, shard: Shard, row: _Row, settings: UpstreamSettings) -> Upstream:
        key, resource = self._factory.account_key(settings), resource_of(settings)
        resources = self._resources.setdefault(key, {})
        if resource is not None:
            resources.setdefault(resource.name, resource)
        elif not resources and not self._settings.credentials.password_file:
            detail = f"{self._shown(shard)}: no endpoint of its workspace is known to mint for"
            raise ProxyError(ErrorKind.SHARD_ROW_INVALID, detail)
        self.discard(shard.shard_id)
        name = target_name(self.map_name, shard)
        upstream = self._factory.make(name, settings, list(resources.values()))
        if self._closed and upstream.pool is not None:  # for one dial
            upstream.pool.drain()
        self._add(shard.shard_id, row, upstream)
        self._offer(key, upstream.account)
        return upstream

    def _add(self, shard_id: UUID, row: _Row, upstream: Upstream) -> None:
        if self._closed:
            return
        self._made[shard_id] = _Made(row, upstream, upstream.hold())

    def _offer(self, key: AccountKey, account: TokenAccount | None) -> None:
        """Mint for any of the account's resources: one of them may be deleted."""
        resources = list(self._resources.get(key, {}).values())
        if account is not None and account.minter is not None and resources:
            account.minter.offer(resources)

    def _shown(self, shard: Shard) -> str:
        host = "".join(one if one.isprintable() and one != " " else "?" for one in shard.host)
        return f"shard {target_name(self.map_name, shard)} at {host[:253]}"


def _row(shard: Shard) -> _Row:
    """Return what an upstream depends on."""
    return (
        shard.name,
        shard.host,
        shard.port,
        shard.database,
        shard.endpoint,
        shard.instance,
        shard.workspace,
    )


def _given(row: _Row, settings: Settings) -> UpstreamSettings:
    """Return what a row gives. Raises ValueError for values that no shard may have."""
    _, host, port, database, endpoint, instance, workspace = row
    if not database.isprintable() or not _RESOURCE.fullmatch(endpoint + instance):
        raise ValueError("the row is not one of `shards add-shard`")
    return UpstreamSettings.model_validate(
        {
            "host": host,
            "hostaddr": settings.catalogue.shard_hostaddr,
            "port": port,
            "database": database,
            "endpoint": endpoint,
            "instance": instance,
            "workspace": workspace,
        }
    )
