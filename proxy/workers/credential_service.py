"""The supervisor's side of what workers ask of workspaces: tokens, hosts and identities.

For: answering from the upstreams of the configuration that a worker names. Not for: when to mint,
or what a failure means (`workspace`).

A generation is the number of a configuration; each reload makes the next.

Invariants: an answer is of the generation that it was asked for by, or a refusal. What several
workers look up at once is asked of the workspace once. What one of them found out is not lost to
the others, or to the successor of one that died, while the workspace does not answer.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeVar

from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.upstreams import Upstream, Upstreams
from proxy.workers.remote_credentials import GENERATIONS_MAX
from proxy.workers.rpc import Methods
from proxy.workspace.client import Identity
from proxy.workspace.outage import ApiCall
from proxy.workspace.registry import TokenAccount
from proxy.workspace.resources import ResourceStatus
from proxy.workspace.single_flight import BACKOFF_SECONDS_MIN, PendingCalls, SingleFlight

T = TypeVar("T")


class _UpstreamFacts:
    """What the workspace said of one upstream. A reload that keeps the upstream keeps this too."""

    def __init__(self, upstream: Upstream, calls: PendingCalls) -> None:
        self.upstream = upstream
        self._status: ResourceStatus | None = None
        self._identity: Identity | None = None
        self._look_up = SingleFlight(self._ask_status, calls)
        self._identify = SingleFlight(self._ask_identity, calls)

    async def status(self) -> ResourceStatus:
        """Return the present state and host, or the last ones while the workspace fails.

        Raises ProxyError.
        """
        try:
            return await self._look_up.result()
        except ProxyError:
            if self._status is None:
                raise
            return self._status

    async def identity(self) -> Identity:
        """Return who we are in this workspace. Raises ProxyError."""
        return self._identity or await self._identify.result()

    async def _ask_status(self) -> ResourceStatus:
        assert self.upstream.resource is not None, "it was asked for by its resource"
        with self._recorded(ApiCall.LOOK_UP):
            status = await self.upstream.workspace.status(self.upstream.resource)
        if status.host and not status.disabled:
            self._status = status
        return status

    async def _ask_identity(self) -> Identity:
        with self._recorded(ApiCall.IDENTITY):
            self._identity = await self.upstream.workspace.identity()
        self.upstream.address_lookup.keep_role(self._identity.role)
        return self._identity

    @contextmanager
    def _recorded(self, call: ApiCall) -> Iterator[None]:
        """Record the call's outcome: workers know no outage but their own."""
        outage = self.upstream.address_lookup.outage
        try:
            yield
        except ProxyError as error:
            outage.record_failure(call, error, BACKOFF_SECONDS_MIN)
            raise
        outage.record_success(call)


class _Generation:
    """The upstreams of one configuration, by what workers know of them.

    Raises ProxyError for what is not in it: a worker that has not heard of a reload asks for that.
    """

    def __init__(
        self,
        upstreams: Iterable[Upstream],
        before: Mapping[int, _UpstreamFacts],
        calls: PendingCalls,
        shards: Iterable[tuple[str, Upstream]] = (),
    ) -> None:
        """`shards` are those of a map in a catalogue, which come and go."""
        self._shards = shards
        self._calls = calls
        self.facts: dict[int, _UpstreamFacts] = {}  # by the upstream's id()
        self._by_workspace: dict[str, _UpstreamFacts] = {}
        self._by_resource: dict[tuple[str, str, bool, bool], _UpstreamFacts] = {}
        self._accounts: dict[tuple[str, str], TokenAccount] = {}
        for upstream in upstreams:
            workspace, resource = upstream.account_key.workspace.name, upstream.resource
            facts = before.get(id(upstream)) or _UpstreamFacts(upstream, calls)
            self.facts[id(upstream)] = facts
            self._by_workspace.setdefault(workspace, facts)
            if resource is not None:
                key = (workspace, resource.name, resource.read_only, resource.pooled)
                self._by_resource.setdefault(key, facts)
            if upstream.account is not None:
                instance = upstream.account_key.instance
                self._accounts.setdefault((workspace, instance), upstream.account)

    def account(self, workspace: str, instance: str) -> TokenAccount:
        """Return whose tokens open a workspace's endpoints, or one of its instances."""
        found = self._accounts.get((workspace, instance))
        if found is None:
            found = next(
                (
                    upstream.account
                    for upstream in self._of_shards(workspace)
                    if upstream.account_key.instance == instance
                ),
                None,
            )
        return _required(found)

    def resource(self, workspace: str, name: str, read_only: bool, pooled: bool) -> _UpstreamFacts:
        """Return what is known of an upstream with this resource."""
        return _required(self._by_resource.get((workspace, name, read_only, pooled)))

    def workspace(self, name: str) -> _UpstreamFacts:
        """Return what is known of an upstream in this workspace."""
        if name not in self._by_workspace and (found := next(self._of_shards(name), None)):
            self._by_workspace[name] = _UpstreamFacts(found, self._calls)
        return _required(self._by_workspace.get(name))

    def _of_shards(self, workspace: str) -> Iterator[Upstream]:
        """Yield the upstreams of shards in a workspace, as far as they are in use."""
        for _, upstream in self._shards:
            if upstream.account_key.workspace.name == workspace:
                yield upstream


def _required(found: T | None) -> T:
    if found is None:
        raise ProxyError(ErrorKind.SHUTTING_DOWN, "the configuration has changed meanwhile")
    return found


_EMPTY: Final = _Generation((), {}, PendingCalls())


class CredentialService:
    """Answers from the newest generations."""

    def __init__(self) -> None:
        self._calls = PendingCalls()
        self._generations: dict[int, _Generation] = {}
        self._uses: dict[int, ExitStack] = {}  # each keeps the upstreams of a generation open

    def register(
        self,
        generation: int,
        upstreams: Upstreams,
        shards: Iterable[tuple[str, Upstream]] | None = None,
    ) -> None:
        """Answer for one more generation, and no longer for the oldest.

        `shards` are the upstreams of a catalogue's map by name, as they are when they are asked.
        """
        # The upstreams are held here, so that no other can have the id() of one of them.
        before = {
            key: facts
            for generation_before in self._generations.values()
            for key, facts in generation_before.facts.items()
        }
        self._generations[generation] = _Generation(
            upstreams.values(),
            before,
            self._calls,
            () if shards is None else shards,  # there may be none yet
        )
        self._uses[generation] = upstreams.keep_open()
        if len(self._generations) > GENERATIONS_MAX:
            oldest = min(self._generations)
            del self._generations[oldest]
            self._uses.pop(oldest).close()

    async def close(self) -> None:
        """Cancel the calls that are open."""
        await self._calls.close()

    @property
    def methods(self) -> Methods:
        """The methods that a worker may call, by name."""
        return {
            "fresh": self._fresh,
            "reject": self._reject,
            "status": self._status,
            "identity": self._identity,
        }

    async def _fresh(self, generation: int, workspace: str, instance: str) -> dict[str, Any]:
        account = self._at(generation).account(workspace, instance)
        credential = await account.token_source.fresh()
        return {
            "secret": credential.secret.reveal().decode(),
            "requested_at": credential.requested_at,
            "expires_at": credential.expires_at,
            "accepted_age_seconds": account.token_source.accepted_age_seconds,
        }

    async def _reject(
        self, generation: int, workspace: str, instance: str, requested_at: float
    ) -> None:
        account = self._at(generation).account(workspace, instance)
        newest = account.token_source.newest
        if newest is not None and newest.requested_at == requested_at:
            account.token_source.reject(newest)

    async def _status(
        self, generation: int, workspace: str, resource: str, read_only: bool, pooled: bool
    ) -> list[Any]:
        facts = self._at(generation).resource(workspace, resource, read_only, pooled)
        status = await facts.status()
        # The worker refuses a host that is not a string; any other value will do for that.
        host = status.host if isinstance(status.host, str) else True
        return [status.state, host, status.disabled]

    async def _identity(self, generation: int, workspace: str) -> list[Any]:
        identity = await self._at(generation).workspace(workspace).identity()
        return [identity.role, identity.host, identity.auth_type]

    def _at(self, generation: int) -> _Generation:
        return self._generations.get(generation, _EMPTY)
