"""Where the supervisor answers what its workers ask of workspaces.

For: tokens, hosts and identities, from the ways of the configuration that is named. Not for: when
to mint, or what a failure means (`upstream`).

Invariant: an answer is of the configuration that it was asked for by, or a refusal. What several
workers look up at once is asked of the workspace once.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.fleet import Account, Fleet, Way
from proxy.upstream.resources import Instance
from proxy.upstream.shared import Shared
from proxy.workers.accounts import CONFIGURATIONS_MAX
from proxy.workers.channel import Answers

T = TypeVar("T")
_Look = Callable[[], Awaitable[list[Any]]]


class _Configuration:
    """The ways of one fleet, by what workers know of them. Raises ProxyError for what is not in it,
    which is what a worker asks for that has not heard of a reload."""

    def __init__(self, ways: Iterable[Way]) -> None:
        self._by_workspace: dict[str, Way] = {}
        self._by_resource: dict[tuple[str, str, bool], Way] = {}
        self._accounts: dict[tuple[str, str], Account] = {}
        for way in ways:
            workspace, resource = way.profile.name, way.resource
            self._by_workspace.setdefault(workspace, way)
            if resource is not None:
                key = (workspace, resource.name, resource.read_only)
                self._by_resource.setdefault(key, way)
            if way.account is not None:
                instance = resource.name if isinstance(resource, Instance) else ""
                self._accounts.setdefault((workspace, instance), way.account)

    def account(self, workspace: str, instance: str) -> Account:
        """Return whose tokens open a workspace's endpoints, or one of its instances."""
        return _known(self._accounts.get((workspace, instance)))

    def way(self, workspace: str, resource: str, read_only: bool) -> Way:
        """Return a way to a resource."""
        return _known(self._by_resource.get((workspace, resource, read_only)))

    def any_way(self, workspace: str) -> Way:
        """Return one of a workspace's ways."""
        return _known(self._by_workspace.get(workspace))


def _known(found: T | None) -> T:
    if found is None:
        raise ProxyError(ErrorKind.SHUTTING_DOWN, "the configuration has changed meanwhile")
    return found


_FORGOTTEN: Final = _Configuration(())


class Desk:
    """Answers from the newest configurations."""

    def __init__(self) -> None:
        self._configurations: dict[int, _Configuration] = {}
        self._look_ups: dict[tuple[object, ...], Shared[list[Any]]] = {}

    def open(self, number: int, fleet: Fleet) -> None:
        """Answer for one more configuration, and no longer for the oldest."""
        self._configurations[number] = _Configuration(fleet.values())
        if len(self._configurations) > CONFIGURATIONS_MAX:
            del self._configurations[min(self._configurations)]

    async def close(self) -> None:
        """End what is being looked up."""
        for look_up in list(self._look_ups.values()):
            await look_up.close()

    @property
    def answers(self) -> Answers:
        """What a worker may call."""
        return {
            "fresh": self._fresh,
            "reject": self._reject,
            "status": self._status,
            "identity": self._identity,
        }

    async def _fresh(self, configuration: int, workspace: str, instance: str) -> dict[str, Any]:
        account = self._at(configuration).account(workspace, instance)
        credential = await account.credentials.fresh()
        return {
            "secret": credential.secret.reveal().decode(),
            "requested_at": credential.requested_at,
            "expires_at": credential.expires_at,
        }

    async def _reject(
        self, configuration: int, workspace: str, instance: str, requested_at: float
    ) -> None:
        account = self._at(configuration).account(workspace, instance)
        newest = account.credentials.newest
        if newest is not None and newest.requested_at == requested_at:
            account.credentials.reject(newest)

    async def _status(
        self, configuration: int, workspace: str, resource: str, read_only: bool
    ) -> list[Any]:
        way = self._at(configuration).way(workspace, resource, read_only)

        async def status() -> list[Any]:
            assert way.resource is not None, "it was found by it"
            answer = await way.workspace.status(way.resource)
            # What is no text is refused there as here; anything that is none will do.
            host = answer.host if isinstance(answer.host, str) else True
            return [answer.state, host, answer.disabled]

        return await self._once((configuration, workspace, resource, read_only), status)

    async def _identity(self, configuration: int, workspace: str) -> list[Any]:
        way = self._at(configuration).any_way(workspace)

        async def identity() -> list[Any]:
            answer = await way.workspace.identity()
            return [answer.role, answer.host, answer.auth_type]

        return await self._once((configuration, workspace), identity)

    async def _once(self, what: tuple[object, ...], look: _Look) -> list[Any]:
        """Look something up, for all who want it at this moment."""

        async def look_and_forget() -> list[Any]:
            try:
                return await look()
            finally:
                del self._look_ups[what]

        return await self._look_ups.setdefault(what, Shared(look_and_forget)).result()

    def _at(self, configuration: int) -> _Configuration:
        return self._configurations.get(configuration, _FORGOTTEN)
