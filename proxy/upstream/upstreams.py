"""The upstreams of one configuration: for each target a dialer with the credentials it needs.

For: building them, and keeping what a reload leaves as it was. Not for: choosing the target
(`routing`), or how its tokens are shared (`workspace.registry`).

Invariant: an upstream never changes, so that a token of one workspace cannot be sent to a host of
another. A reload builds new upstreams, except where the configuration is as before: such an
upstream keeps its token, host and identity, and asks the workspace nothing. A dial on an upstream
of an earlier configuration ends on that one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from proxy.config import (
    UPSTREAM,
    ConfigurationError,
    Problem,
    Settings,
    UpstreamSettings,
    target_key,
)
from proxy.transport.tls import client_context
from proxy.upstream.address_lookup import AddressLookup
from proxy.upstream.connector import Connector
from proxy.upstream.dialer import CredentialSource, Dialer
from proxy.upstream.name_lookup import NameLookup
from proxy.upstream.password_file import PasswordFile
from proxy.upstream.phases import DialPhases, RecordTargetPhase
from proxy.upstream.upstream_session import Admit, UpstreamSession
from proxy.wire.startup import StartupMessage
from proxy.workspace.client import WorkspaceSource
from proxy.workspace.login_settings import authorities_problem
from proxy.workspace.outage import Outage
from proxy.workspace.registry import (
    AccountKey,
    TokenAccount,
    WorkspaceRegistry,
    workspace_key_of,
)
from proxy.workspace.resources import Resource, resource_of


class RouteReplaced(Exception):
    """The map that a client was routed by was exchanged for another: route the client anew."""


class SessionOpener(Protocol):
    """Opens upstream sessions for clients: an `Upstream` does, a pool or admission wraps one."""

    @property
    def cancel_on_disconnect(self) -> bool:
        """Whether the query of a client that disappears is ended."""

    @property
    def checks_connection(self) -> bool:
        """Whether the database does that itself; a CancelRequest then ends COPY data only."""

    async def open(
        self,
        client: StartupMessage,
        phases: DialPhases,
        fallback: StartupMessage | None = None,
    ) -> UpstreamSession:
        """Open a session for this client; with `fallback` if the database does not exist.

        `phases` shows meanwhile what it waits for.

        Raises ProxyError, RouteReplaced; and ClientViolation for a StartupMessage that cannot be
        passed on.
        """


class SessionPool(Protocol):
    """Keeps the sessions of one dialer for the next clients (`proxy/pool`)."""

    @property
    def held(self) -> AbstractContextManager[None]:
        """The context of a configuration that has the pool, which closes after the last one."""

    async def open(
        self,
        client: StartupMessage,
        phases: DialPhases,
        fallback: StartupMessage | None = None,
        *,
        admit: Admit | None = None,
        timeout_seconds: float | None = None,
    ) -> UpstreamSession:
        """Return a kept session for this client, or dial one. Raises what `Dialer.dial` does."""

    def reconnect(self) -> None:
        """Close what is idle now, and after its client each session that has one."""

    def drain(self) -> None:
        """Keep nothing from now on: close what is idle."""

    async def wait_closed(self) -> None:
        """Return when none of its connections is open, after `drain` and the last client."""


MakePool = Callable[[str, UpstreamSettings, Dialer], SessionPool]
"""Makes the pool of a target with this name and these settings."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One target at run time. A session needs `open` only; `check` uses each part.

    `resource` is None where a plain host is dialled with a password.
    """

    settings: UpstreamSettings
    account_key: AccountKey
    resource: Resource | None
    workspace: WorkspaceSource
    account: TokenAccount | None
    credentials: CredentialSource
    address_lookup: AddressLookup
    dialer: Dialer
    use: AbstractContextManager[None]
    """Keeps workspace and account open while its block runs; it may be entered inside itself."""
    pool: SessionPool | None = None
    """None where each session ends with its client."""

    @property
    def cancel_on_disconnect(self) -> bool:
        """Whether the query of a client that disappears is ended."""
        return self.settings.cancel_on_disconnect

    @property
    def checks_connection(self) -> bool:
        """Whether the database does that itself; a CancelRequest then ends COPY data only."""
        return self.settings.cancel_method == "connection_check"

    async def open(
        self,
        client: StartupMessage,
        phases: DialPhases,
        fallback: StartupMessage | None = None,
        *,
        admit: Admit | None = None,
        timeout_seconds: float | None = None,
    ) -> UpstreamSession:
        """Return a session upstream for this client. Takes and raises what `Dialer.dial` does."""
        open_session = self.dialer.dial if self.pool is None else self.pool.open
        with self.use:
            return await open_session(
                client,
                phases,
                fallback,
                admit=admit,
                timeout_seconds=timeout_seconds,
            )

    def unpooled(self) -> "Upstream":
        """Return the same without its pool: for connections of the proxy's own."""
        return replace(self, pool=None)

    def hold(self) -> ExitStack:
        """Keep it open, and its pool, until the stack that is returned is closed."""
        held = ExitStack()
        held.enter_context(self.use)
        if self.pool is not None:
            held.enter_context(self.pool.held)
        return held


class UpstreamFactory:
    """Makes one upstream from a name and its settings, for one configuration.

    `name` is the label of its metrics. The caller keeps the upstream's workspace open (`use`) for
    as long as it keeps the upstream.
    """

    def __init__(
        self,
        settings: Settings,
        registry: WorkspaceRegistry,
        record_phase: RecordTargetPhase,
        name_lookup: NameLookup,
        password_file: PasswordFile | None = None,
        *,
        make_pool: MakePool | None = None,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._record_phase = record_phase
        self._name_lookup = name_lookup
        self._password_file = password_file
        self._make_pool = make_pool

    def account_key(self, target: UpstreamSettings) -> AccountKey:
        """Return the key of the account whose tokens this target is sent."""
        return AccountKey.of(workspace_key_of(self._settings, target), resource_of(target))

    def make(
        self, name: str, target: UpstreamSettings, resources: Sequence[Resource] | None = None
    ) -> Upstream:
        """Return a new upstream. Its tokens are minted for one of `resources`, or for its own."""
        key, resource = self.account_key(target), resource_of(target)
        if resources is None:
            resources = [] if resource is None else [resource]
        workspace = self._registry.workspace(key.workspace)
        account: TokenAccount | None = None
        credentials: CredentialSource
        if self._password_file is not None:
            credentials = self._password_file
        else:
            account = self._registry.account(key, list(resources))
            credentials = account.token_source
        if account is None:
            outage = self._registry.look_up_outage(key)
        else:  # None: the process that mints logs and shows it
            outage = account.outage or Outage(account.name, words=None)
        lookup = AddressLookup(target, resource, workspace, self._registry.calls, outage=outage)
        dialer = Dialer(
            Connector(self._name_lookup.resolve),
            lookup,
            credentials,
            partial(self._record_phase, name),
            connect_timeout_seconds=target.connect_timeout_seconds,
            connect_retry_seconds=target.connect_retry_seconds,
            connects_max=target.connects_max,
            connection_check=target.cancel_on_disconnect
            and target.cancel_method == "connection_check",
        )
        use = self._registry.use_of(key)
        pool = None
        if self._make_pool is not None and target.pool != "off":
            pool = self._make_pool(name, target, dialer)
        return Upstream(
            target, key, resource, workspace, account, credentials, lookup, dialer, use, pool
        )


class Upstreams(Mapping[str, Upstream]):
    """The upstreams of one configuration by the targets' names. `close` them when it is replaced.

    `connects_max` of a target is counted for each upstream: sessions that are being opened on the
    one that a reload replaced do not count for the new one.
    """

    def __init__(
        self,
        settings: Settings,
        registry: WorkspaceRegistry,
        record_phase: RecordTargetPhase,
        before: "Upstreams | None" = None,
        *,
        make_pool: MakePool | None = None,
    ) -> None:
        """`before` are the upstreams in force; those that are configured as before are kept.

        Without `make_pool` no target pools, whatever its settings say: for a process that serves no
        clients.

        Raises ConfigurationError for certificate files that cannot be used.
        """
        _check_root_certs(settings)
        self.name_lookup: NameLookup = (
            NameLookup(registry.calls) if before is None else before.name_lookup
        )
        self.password_file = _password_file(settings, before)
        self.factory = UpstreamFactory(
            settings,
            registry,
            record_phase,
            self.name_lookup,
            self.password_file,
            make_pool=make_pool,
        )
        targets = {name: settings.target(name) for name in settings.target_names()}
        resources = self._resources(targets.values())
        self._upstreams = {
            name: self._kept(name, target, before or {})
            or self.factory.make(name, target, resources.get(self.factory.account_key(target)))
            for name, target in targets.items()
        }
        self._use = ExitStack()
        for upstream in self._upstreams.values():
            self._use.push(upstream.hold())
        for upstream in self._upstreams.values():
            if upstream.account is not None and upstream.account.minter is not None:
                upstream.account.minter.offer(resources[upstream.account_key])

    def __getitem__(self, target: str) -> Upstream:
        return self._upstreams[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._upstreams)

    def __len__(self) -> int:
        return len(self._upstreams)

    def keep_open(self) -> ExitStack:
        """Keep these upstreams open until the stack that is returned is closed."""
        uses = ExitStack()
        for upstream in self._upstreams.values():
            uses.enter_context(upstream.use)
        return uses

    def close(self) -> None:
        """Close what no other configuration and no dial uses; the rest after its last use."""
        self._use.close()

    @property
    def outages(self) -> list[Outage]:
        """Whether credentials can be had, and hosts with a password: each may occur repeatedly."""
        outages = [account.outage for account in self.accounts if account.outage is not None]
        if self.password_file is not None:
            outages.append(self.password_file.outage)
            outages += [
                one.address_lookup.outage for one in self._upstreams.values() if one.resource
            ]
        return outages

    @property
    def accounts(self) -> list[TokenAccount]:
        """The accounts in use, each once."""
        accounts = dict.fromkeys(upstream.account for upstream in self._upstreams.values())
        return [account for account in accounts if account is not None]

    def resources(self) -> Iterator[tuple[AccountKey, Resource]]:
        """Yield what tokens are minted for, with the account that the token is good for."""
        for upstream in self._upstreams.values():
            if upstream.resource is not None:
                yield upstream.account_key, upstream.resource

    def _resources(self, targets: Iterable[UpstreamSettings]) -> dict[AccountKey, list[Resource]]:
        """Return the resources of each account: a token for one of them is good for all."""
        resources: dict[AccountKey, dict[str, Resource]] = defaultdict(dict)
        for target in targets:
            if resource := resource_of(target):
                resources[self.factory.account_key(target)].setdefault(resource.name, resource)
        return {key: list(named.values()) for key, named in resources.items()}

    def _kept(
        self, name: str, target: UpstreamSettings, before: Mapping[str, Upstream]
    ) -> Upstream | None:
        """Return the upstream in force, if it is configured as before."""
        found = before.get(name)
        if found is None or found.settings != target:
            return None
        return found if found.account_key == self.factory.account_key(target) else None


def _password_file(settings: Settings, before: Upstreams | None) -> PasswordFile | None:
    """Return the file that all upstreams share; with the same path it is the one before."""
    path = settings.credentials.password_file
    found = before.password_file if before is not None else None
    if found is not None and found.path == path:
        return found
    return PasswordFile(path) if path else None


def _check_root_certs(settings: Settings) -> None:
    """Raise ConfigurationError for files that cannot be used, now and not at the first dial."""
    problems = [*_workspace_root_certs(settings)]
    # The shards of a catalogue have those of [upstream].
    of_shards = [UPSTREAM] if settings.catalogue_map else []
    for name in dict.fromkeys((*settings.target_names(), *of_shards)):
        target = settings.target(name)
        try:
            # The context is cached, so that the first session need not read the authorities.
            client_context(target.sslmode, target.ssl_root_cert, accelerated=target.accelerated)
        except OSError as error:  # an ssl.SSLError is one
            key = target_key(name, "ssl_root_cert")
            text = f"{target.ssl_root_cert}: {error.strerror or error}"
            problems.append(Problem(key, text))
    if problems:
        raise ConfigurationError(problems)


def _workspace_root_certs(settings: Settings) -> Iterator[Problem]:
    """Yield a problem for each file of a workspace that cannot be used, also if none needs it."""
    sections = {f"workspaces.{name}": one for name, one in settings.workspaces.items()}
    for section, workspace in {"workspace": settings.workspace, **sections}.items():
        path = workspace.ssl_root_cert
        if path and (text := authorities_problem(path)):
            yield Problem(f"{section}.ssl_root_cert", text)
