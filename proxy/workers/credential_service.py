"""Where the supervisor answers what its workers ask of workspaces.

For: tokens, hosts and identities, from the ways of the configuration that is named. Not for: when
to mint, or what a failure means (`upstream`).

Invariants: an answer is of the configuration that it was asked for by, or a refusal. What several
workers look up at once is asked of the workspace once; and what one of them has found out is not
lost to the others, or to the successor of one that died, while the workspace is away.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Final, TypeVar

from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.upstreams import Upstream, Upstreams
from proxy.workers.remote_credentials import CONFIGURATIONS_MAX
from proxy.workers.rpc import Methods
from proxy.workspace.client import Identity
from proxy.workspace.registry import TokenAccount
from proxy.workspace.resources import ResourceStatus
from proxy.workspace.single_flight import PendingCalls, SingleFlight

T = TypeVar("T")


class _Found:
    """What was found out for one way; a reload that leaves the way as it is leaves this, too."""

    def __init__(self, upstream: Upstream, calls: PendingCalls) -> None:
        self.upstream = upstream
        self._status: ResourceStatus | None = None
        self._identity: Identity | None = None
        self._look_up = SingleFlight(self._ask_status, calls)
        self._identify = SingleFlight(self._ask_identity, calls)

    async def status(self) -> ResourceStatus:
        """Return state and host as they are now; while nobody can say, as they were last."""
        try:
            return await self._look_up.result()
        except ProxyError:
            if self._status is None:
                raise
            return self._status

    async def identity(self) -> Identity:
        """Return who we are there. Raises ProxyError."""
        return self._identity or await self._identify.result()

    async def _ask_status(self) -> ResourceStatus:
        assert self.upstream.resource is not None, "it was asked for by its resource"
        status = await self.upstream.workspace.status(self.upstream.resource)
        if status.host and not status.disabled:
            self._status = status
        return status

    async def _ask_identity(self) -> Identity:
        self._identity = await self.upstream.workspace.identity()
        return self._identity


class _Configuration:
    """The ways of one fleet, by what workers know of them. Raises ProxyError for what is not in it,
    which is what a worker asks for that has not heard of a reload."""

    def __init__(
        self, upstreams: Iterable[Upstream], before: Mapping[int, _Found], calls: PendingCalls
    ) -> None:
        self.found: dict[int, _Found] = {}  # by the way itself, which two of one fleet never share
        self._by_workspace: dict[str, _Found] = {}
        self._by_resource: dict[tuple[str, str, bool], _Found] = {}
        self._accounts: dict[tuple[str, str], TokenAccount] = {}
        for upstream in upstreams:
            workspace, resource = upstream.account_key.workspace.name, upstream.resource
            found = self.found[id(upstream)] = before.get(id(upstream)) or _Found(upstream, calls)
            self._by_workspace.setdefault(workspace, found)
            if resource is not None:
                key = (workspace, resource.name, resource.read_only)
                self._by_resource.setdefault(key, found)
            if upstream.account is not None:
                instance = upstream.account_key.instance
                self._accounts.setdefault((workspace, instance), upstream.account)

    def account(self, workspace: str, instance: str) -> TokenAccount:
        """Return whose tokens open a workspace's endpoints, or one of its instances."""
        return _known(self._accounts.get((workspace, instance)))

    def resource(self, workspace: str, name: str, read_only: bool) -> _Found:
        """Return what is found out for a resource."""
        return _known(self._by_resource.get((workspace, name, read_only)))

    def workspace(self, name: str) -> _Found:
        """Return what is found out for one of a workspace's ways."""
        return _known(self._by_workspace.get(name))


def _known(found: T | None) -> T:
    if found is None:
        raise ProxyError(ErrorKind.SHUTTING_DOWN, "the configuration has changed meanwhile")
    return found


_FORGOTTEN: Final = _Configuration((), {}, PendingCalls())


class CredentialService:
    """Methods from the newest configurations."""

    def __init__(self) -> None:
        self._calls = PendingCalls()
        self._configurations: dict[int, _Configuration] = {}
        self._uses: dict[int, ExitStack] = {}  # their upstreams stay open as long

    def open(self, number: int, upstreams: Upstreams) -> None:
        """Answer for one more configuration, and no longer for the oldest."""
        # While they are held here no other way can have their place in memory.
        before = {
            place: found
            for configuration in self._configurations.values()
            for place, found in configuration.found.items()
        }
        self._configurations[number] = _Configuration(upstreams.values(), before, self._calls)
        self._uses[number] = upstreams.keep_open()
        if len(self._configurations) > CONFIGURATIONS_MAX:
            oldest = min(self._configurations)
            del self._configurations[oldest]
            self._uses.pop(oldest).close()

    async def close(self) -> None:
        """End what is being looked up."""
        await self._calls.close()

    @property
    def methods(self) -> Methods:
        """What a worker may call."""
        return {
            "fresh": self._fresh,
            "reject": self._reject,
            "status": self._status,
            "identity": self._identity,
        }

    async def _fresh(self, configuration: int, workspace: str, instance: str) -> dict[str, Any]:
        account = self._at(configuration).account(workspace, instance)
        credential = await account.token_source.fresh()
        return {
            "secret": credential.secret.reveal().decode(),
            "requested_at": credential.requested_at,
            "expires_at": credential.expires_at,
        }

    async def _reject(
        self, configuration: int, workspace: str, instance: str, requested_at: float
    ) -> None:
        account = self._at(configuration).account(workspace, instance)
        newest = account.token_source.newest
        if newest is not None and newest.requested_at == requested_at:
            account.token_source.reject(newest)

    async def _status(
        self, configuration: int, workspace: str, resource: str, read_only: bool
    ) -> list[Any]:
        answer = await self._at(configuration).resource(workspace, resource, read_only).status()
        # What is no text is refused there as here; anything that is none will do.
        host = answer.host if isinstance(answer.host, str) else True
        return [answer.state, host, answer.disabled]

    async def _identity(self, configuration: int, workspace: str) -> list[Any]:
        answer = await self._at(configuration).workspace(workspace).identity()
        return [answer.role, answer.host, answer.auth_type]

    def _at(self, configuration: int) -> _Configuration:
        return self._configurations.get(configuration, _FORGOTTEN)
