"""The ways to all targets of one configuration.

For: a dialer for each target, and one source of tokens for all the targets that one identity
reaches in one workspace. Not for: choosing the target (`routing`).

Invariants: a way never changes, so that a token of one workspace cannot meet a host of another. A
reload makes a new fleet, in which what is configured as before is the same way: it keeps its token,
host and identity, and asks the workspace nothing. Whoever still dials on an old way keeps that
alive, and nobody else does.
"""

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

from proxy.config import (
    UPSTREAM,
    ConfigurationError,
    CredentialsSettings,
    Problem,
    Settings,
    UpstreamSettings,
    WorkspaceSettings,
)
from proxy.observe.metrics import ConnectPhase, Metrics
from proxy.transport.tls import client_context
from proxy.upstream.address_lookup import AddressLookup, WorkspaceSource
from proxy.upstream.connector import Connector
from proxy.upstream.dialer import Dialer, UpstreamSession
from proxy.wire.startup import StartupMessage
from proxy.workspace.client import Workspace
from proxy.workspace.minter import Minter
from proxy.workspace.resources import Endpoint, Instance, Resource, resource_of
from proxy.workspace.token_source import Credentials, CredentialSource, PasswordFile, TokenSource

PhaseTook = Callable[[str, ConnectPhase, float], None]
"""Hears the target, the phase that succeeded there, and its seconds."""


class SessionOpener(Protocol):
    """Opens upstream sessions for clients: an `Upstream` does, a pool or admission wraps one."""

    @property
    def cancel_on_disconnect(self) -> bool:
        """Whether the query of a client that disappears is cancelled."""

    async def open(self, client: StartupMessage) -> UpstreamSession:
        """Open a session for this client.

        Raises ProxyError; and ClientViolation for a StartupMessage that cannot be passed on.
        """


@dataclass(frozen=True, slots=True)
class Upstream:
    """The way to one target, part by part: a session needs the dialer, `check` walks through all.

    `resource` is None where a plain host is dialled with a password.
    """

    settings: UpstreamSettings
    workspace_key: "WorkspaceKey"
    resource: Resource | None
    workspace: WorkspaceSource
    account: "TokenAccount | None"
    credentials: CredentialSource
    address_lookup: AddressLookup
    dialer: Dialer

    @property
    def cancel_on_disconnect(self) -> bool:
        """Whether the query of a client that disappears is cancelled."""
        return self.settings.cancel_on_disconnect

    async def open(self, client: StartupMessage) -> UpstreamSession:
        """Open a session for this client. Raises what `Dialer.dial` does."""
        return await self.dialer.dial(client)


@dataclass(frozen=True, slots=True)
class TokenAccount:
    """One identity in one workspace, as far as it shares tokens: equal ones are one."""

    name: str
    """What it is called where its tokens' times are shown."""
    credentials: TokenSource
    minting: Minter | None
    """None where another process mints."""


@dataclass(frozen=True, slots=True)
class WorkspaceKey:
    """What a `Workspace` is made from: two that are equal are one."""

    name: str
    settings: WorkspaceSettings
    credentials: CredentialsSettings

    def shown(self, instance: str) -> str:
        """Return what its account is called; that of an instance alone has a name of its own."""
        section = self.name or "workspace"
        return f"{section}/{instance}" if instance else section


def workspace_key_of(settings: Settings, target: UpstreamSettings) -> WorkspaceKey:
    """Return the profile that a target with these effective values belongs to."""
    return WorkspaceKey(target.workspace, settings.workspace_of(target), settings.credentials)


_TokenAccountKey = tuple[WorkspaceKey, str]


class WorkspaceRegistry(Protocol):
    """Where the ways of a fleet get their tokens and look up their hosts."""

    def workspace(self, workspace_key: WorkspaceKey) -> WorkspaceSource:
        """Return the workspace of a profile."""

    def account(self, workspace_key: WorkspaceKey, resources: list[Resource]) -> TokenAccount:
        """Return the account whose tokens are minted for one of these, whichever will do."""

    def close_at_end(self, lookup: AddressLookup) -> None:
        """Have `close` end these look-ups, too, if somebody still needs them then."""

    async def close(self) -> None:
        """End what is being asked of the workspaces."""


class LocalWorkspaceRegistry:
    """The workspaces and accounts in use, by what they are configured as."""

    def __init__(self, metrics: Metrics, *, version: str) -> None:
        self._metrics = metrics
        self._version = version
        self._workspaces: WeakValueDictionary[WorkspaceKey, Workspace] = WeakValueDictionary()
        # What a mint under way keeps alive, even when no way leads there any more: an account that
        # comes back meanwhile shall not mint a second time beside it, and `close` shall find it.
        self._credentials: WeakValueDictionary[_TokenAccountKey, Credentials] = (
            WeakValueDictionary()
        )
        self._mintings: WeakValueDictionary[_TokenAccountKey, Minter] = WeakValueDictionary()
        self._lookups: WeakSet[AddressLookup] = WeakSet()

    async def close(self) -> None:
        """End what is being asked of the workspaces."""
        for lookup in list(self._lookups):
            await lookup.close()
        for credentials in list(self._credentials.values()):
            await credentials.close()

    def workspace(self, workspace_key: WorkspaceKey) -> Workspace:
        """Return the workspace of a profile."""
        found = self._workspaces.get(workspace_key)
        if found is None:
            found = Workspace(
                workspace_key.settings,
                workspace_key.credentials,
                version=self._version,
                # The environment's identity is that of [workspace].
                discover=not workspace_key.name,
            )
            self._workspaces[workspace_key] = found
        return found

    def account(self, workspace_key: WorkspaceKey, resources: list[Resource]) -> TokenAccount:
        """Return the account whose tokens are minted for one of these, whichever will do.

        A token is good for every endpoint of its workspace, the documentation says. Of Provisioned
        instances it does not: each has tokens of its own, and is alone in `resources`. An account
        that is in use goes on with what it has until it is offered others.
        """
        first = resources[0]
        instance = first.name if isinstance(first, Instance) else ""
        key = (workspace_key, instance)
        credentials, minting = self._credentials.get(key), self._mintings.get(key)
        if credentials is None or minting is None:
            minting = Minter(self.workspace(workspace_key).mint, resources)
            credentials = Credentials(minting, workspace_key.credentials, self._metrics)
            self._credentials[key], self._mintings[key] = credentials, minting
        return TokenAccount(workspace_key.shown(instance), credentials, minting)

    def close_at_end(self, lookup: AddressLookup) -> None:
        """Have `close` end these look-ups, too, if somebody still needs them then."""
        self._lookups.add(lookup)


class Upstreams(Mapping[str, Upstream]):
    """The ways of one configuration, by the targets' names."""

    def __init__(
        self,
        settings: Settings,
        accounts: WorkspaceRegistry,
        phase_took: PhaseTook,
        before: "Mapping[str, Upstream] | None" = None,
    ) -> None:
        """`before` is the fleet that this one replaces: ways that are configured as there go over.

        Another one counts its `connects_max` anew, beside the sessions that are still being opened
        on the way that it replaces.

        Raises ConfigurationError for certificate files that cannot be used.
        """
        _check_root_certs(settings)
        self._settings = settings
        self._accounts = accounts
        self._phase_took = phase_took
        targets = {name: settings.target(name) for name in settings.target_names()}
        endpoints = self._endpoints(targets.values())
        self._before = before or {}
        self._upstreams = {
            name: self._upstream(name, target, endpoints) for name, target in targets.items()
        }
        self._before = {}  # its other ways go when nobody dials on them any more
        for upstream in self._upstreams.values():  # not before all of them could be made
            if upstream.account is not None and upstream.account.minting is not None:
                upstream.account.minting.offer(_alike(upstream, endpoints))

    def __getitem__(self, target: str) -> Upstream:
        return self._upstreams[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._upstreams)

    def __len__(self) -> int:
        return len(self._upstreams)

    @property
    def accounts(self) -> list[TokenAccount]:
        """The accounts in use, for those who show their tokens' ages."""
        accounts = dict.fromkeys(upstream.account for upstream in self._upstreams.values())
        return [account for account in accounts if account is not None]

    def _endpoints(self, targets: Iterable[UpstreamSettings]) -> dict[WorkspaceKey, list[Resource]]:
        """Return the endpoints of each profile: a token for one of them is good for all."""
        endpoints: dict[WorkspaceKey, list[Resource]] = defaultdict(list)
        for target in targets:
            resource = resource_of(target)
            if isinstance(resource, Endpoint):
                found = endpoints[workspace_key_of(self._settings, target)]
                if resource not in found:
                    found.append(resource)
        return endpoints

    def _upstream(
        self, name: str, target: UpstreamSettings, endpoints: Mapping[WorkspaceKey, list[Resource]]
    ) -> Upstream:
        workspace_key, resource = workspace_key_of(self._settings, target), resource_of(target)
        account: TokenAccount | None = None
        if not self._settings.credentials.password_file:
            assert resource is not None, "settings without a password name a resource"
            alone = isinstance(resource, Instance)
            account = self._accounts.account(
                workspace_key, [resource] if alone else endpoints[workspace_key]
            )
        found = self._before.get(name)
        if found is not None and (found.settings, found.workspace_key) == (target, workspace_key):
            return found
        return self._new_upstream(name, target, workspace_key, account)

    def _new_upstream(
        self,
        name: str,
        target: UpstreamSettings,
        workspace_key: WorkspaceKey,
        account: TokenAccount | None,
    ) -> Upstream:
        resource, workspace = resource_of(target), self._accounts.workspace(workspace_key)
        credentials: CredentialSource
        if account is None:
            credentials = PasswordFile(workspace_key.credentials.password_file)
        else:
            credentials = account.credentials
        address_lookup = AddressLookup(target, resource, workspace)
        self._accounts.close_at_end(address_lookup)
        heard = partial(self._phase_took, name)
        dialer = Dialer(
            Connector(heard),
            address_lookup,
            credentials,
            heard,
            connect_timeout_seconds=target.connect_timeout_seconds,
            connects_max=target.connects_max,
        )
        return Upstream(
            target, workspace_key, resource, workspace, account, credentials, address_lookup, dialer
        )


def _alike(upstream: Upstream, endpoints: Mapping[WorkspaceKey, list[Resource]]) -> list[Resource]:
    """Return the resources whose tokens are this way's as well, its own among them."""
    assert upstream.resource is not None, "who has an account has a resource"
    return (
        [upstream.resource]
        if isinstance(upstream.resource, Instance)
        else endpoints[upstream.workspace_key]
    )


def _check_root_certs(settings: Settings) -> None:
    """Raise ConfigurationError for files that cannot be used: it shall show now, not later."""
    problems = []
    for name in settings.target_names():
        target = settings.target(name)
        try:
            if target.ssl_root_cert and Path(target.ssl_root_cert).is_fifo():
                raise OSError(errno.EINVAL, "it is not a regular file")  # opening it might wait
            # The very one that sessions use: reading authorities shall not stop the first of them.
            client_context(target.sslmode, target.ssl_root_cert, accelerated=target.accelerated)
        except OSError as error:  # an ssl.SSLError is one
            key = f"{name if name == UPSTREAM else f'targets.{name}'}.ssl_root_cert"
            text = f"{target.ssl_root_cert}: {error.strerror or error}"
            problems.append(Problem(key, text))
    if problems:
        raise ConfigurationError(problems)
