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
from proxy.upstream.address_lookup import Targets, WorkspaceSource
from proxy.upstream.connector import Connector
from proxy.upstream.dialer import Dialer
from proxy.workspace.client import Workspace
from proxy.workspace.minter import MintForAny
from proxy.workspace.resources import Endpoint, Instance, Resource, resource_of
from proxy.workspace.token_source import Credentials, CredentialSource, PasswordFile, TokenSource

PhaseTook = Callable[[str, ConnectPhase, float], None]
"""Hears the target, the phase that succeeded there, and its seconds."""


@dataclass(frozen=True, slots=True)
class Way:
    """The way to one target, part by part: a session needs the dialer, `check` walks through all.

    `resource` is None where a plain host is dialled with a password.
    """

    settings: UpstreamSettings
    profile: "Profile"
    resource: Resource | None
    workspace: WorkspaceSource
    account: "Account | None"
    credentials: CredentialSource
    targets: Targets
    dialer: Dialer


@dataclass(frozen=True, slots=True)
class Account:
    """One identity in one workspace, as far as it shares tokens: equal ones are one."""

    name: str
    """What it is called where its tokens' times are shown."""
    credentials: TokenSource
    minting: MintForAny | None
    """None where another process mints."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a `Workspace` is made from: two that are equal are one."""

    name: str
    settings: WorkspaceSettings
    credentials: CredentialsSettings

    def shown(self, instance: str) -> str:
        """Return what its account is called; that of an instance alone has a name of its own."""
        section = self.name or "workspace"
        return f"{section}/{instance}" if instance else section


def profile_of(settings: Settings, target: UpstreamSettings) -> Profile:
    """Return the profile that a target with these effective values belongs to."""
    return Profile(target.workspace, settings.workspace_of(target), settings.credentials)


_AccountKey = tuple[Profile, str]


class AccountSource(Protocol):
    """Where the ways of a fleet get their tokens and look up their hosts."""

    def workspace(self, profile: Profile) -> WorkspaceSource:
        """Return the workspace of a profile."""

    def account(self, profile: Profile, resources: list[Resource]) -> Account:
        """Return the account whose tokens are minted for one of these, whichever will do."""

    def close_at_end(self, targets: Targets) -> None:
        """Have `close` end these look-ups, too, if somebody still needs them then."""

    async def close(self) -> None:
        """End what is being asked of the workspaces."""


class Accounts:
    """The workspaces and accounts in use, by what they are configured as."""

    def __init__(self, metrics: Metrics, *, version: str) -> None:
        self._metrics = metrics
        self._version = version
        self._workspaces: WeakValueDictionary[Profile, Workspace] = WeakValueDictionary()
        # What a mint under way keeps alive, even when no way leads there any more: an account that
        # comes back meanwhile shall not mint a second time beside it, and `close` shall find it.
        self._credentials: WeakValueDictionary[_AccountKey, Credentials] = WeakValueDictionary()
        self._mintings: WeakValueDictionary[_AccountKey, MintForAny] = WeakValueDictionary()
        self._targets: WeakSet[Targets] = WeakSet()

    async def close(self) -> None:
        """End what is being asked of the workspaces."""
        for targets in list(self._targets):
            await targets.close()
        for credentials in list(self._credentials.values()):
            await credentials.close()

    def workspace(self, profile: Profile) -> Workspace:
        """Return the workspace of a profile."""
        found = self._workspaces.get(profile)
        if found is None:
            found = Workspace(
                profile.settings,
                profile.credentials,
                version=self._version,
                discover=not profile.name,  # the environment's identity is that of [workspace]
            )
            self._workspaces[profile] = found
        return found

    def account(self, profile: Profile, resources: list[Resource]) -> Account:
        """Return the account whose tokens are minted for one of these, whichever will do.

        A token is good for every endpoint of its workspace, the documentation says. Of Provisioned
        instances it does not: each has tokens of its own, and is alone in `resources`. An account
        that is in use goes on with what it has until it is offered others.
        """
        first = resources[0]
        instance = first.name if isinstance(first, Instance) else ""
        key = (profile, instance)
        credentials, minting = self._credentials.get(key), self._mintings.get(key)
        if credentials is None or minting is None:
            minting = MintForAny(self.workspace(profile).mint, resources)
            credentials = Credentials(minting, profile.credentials, self._metrics)
            self._credentials[key], self._mintings[key] = credentials, minting
        return Account(profile.shown(instance), credentials, minting)

    def close_at_end(self, targets: Targets) -> None:
        """Have `close` end these look-ups, too, if somebody still needs them then."""
        self._targets.add(targets)


class Fleet(Mapping[str, Way]):
    """The ways of one configuration, by the targets' names."""

    def __init__(
        self,
        settings: Settings,
        accounts: AccountSource,
        phase_took: PhaseTook,
        before: "Mapping[str, Way] | None" = None,
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
        self._ways = {name: self._way(name, target, endpoints) for name, target in targets.items()}
        self._before = {}  # its other ways go when nobody dials on them any more
        for way in self._ways.values():  # not before all of them could be made
            if way.account is not None and way.account.minting is not None:
                way.account.minting.offer(_alike(way, endpoints))

    def __getitem__(self, target: str) -> Way:
        return self._ways[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ways)

    def __len__(self) -> int:
        return len(self._ways)

    @property
    def accounts(self) -> list[Account]:
        """The accounts in use, for those who show their tokens' ages."""
        accounts = dict.fromkeys(way.account for way in self._ways.values())
        return [account for account in accounts if account is not None]

    def _endpoints(self, targets: Iterable[UpstreamSettings]) -> dict[Profile, list[Resource]]:
        """Return the endpoints of each profile: a token for one of them is good for all."""
        endpoints: dict[Profile, list[Resource]] = defaultdict(list)
        for target in targets:
            resource = resource_of(target)
            if isinstance(resource, Endpoint):
                found = endpoints[profile_of(self._settings, target)]
                if resource not in found:
                    found.append(resource)
        return endpoints

    def _way(
        self, name: str, target: UpstreamSettings, endpoints: Mapping[Profile, list[Resource]]
    ) -> Way:
        profile, resource = profile_of(self._settings, target), resource_of(target)
        account: Account | None = None
        if not self._settings.credentials.password_file:
            assert resource is not None, "settings without a password name a resource"
            alone = isinstance(resource, Instance)
            account = self._accounts.account(profile, [resource] if alone else endpoints[profile])
        found = self._before.get(name)
        if found is not None and (found.settings, found.profile) == (target, profile):
            return found
        return self._new_way(name, target, profile, account)

    def _new_way(
        self, name: str, target: UpstreamSettings, profile: Profile, account: Account | None
    ) -> Way:
        resource, workspace = resource_of(target), self._accounts.workspace(profile)
        credentials: CredentialSource
        if account is None:
            credentials = PasswordFile(profile.credentials.password_file)
        else:
            credentials = account.credentials
        targets = Targets(target, resource, workspace)
        self._accounts.close_at_end(targets)
        heard = partial(self._phase_took, name)
        dialer = Dialer(
            Connector(heard),
            targets,
            credentials,
            heard,
            connect_timeout_seconds=target.connect_timeout_seconds,
            connects_max=target.connects_max,
        )
        return Way(target, profile, resource, workspace, account, credentials, targets, dialer)


def _alike(way: Way, endpoints: Mapping[Profile, list[Resource]]) -> list[Resource]:
    """Return the resources whose tokens are this way's as well, its own among them."""
    assert way.resource is not None, "who has an account has a resource"
    return [way.resource] if isinstance(way.resource, Instance) else endpoints[way.profile]


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
