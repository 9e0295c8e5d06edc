"""The workspaces and the tokens in use, each made once for all upstreams that share it.

For: one client for each workspace, and one token source for each account. Not for: which upstream
needs which (`upstream.upstreams`).

Invariant: a workspace and an account live as long as something uses them: the upstreams of a
configuration that is in force, a dial on an older one, a mint under way. After the last use the
registry removes them; no call is under way then.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from proxy.config import CredentialsSettings, Settings, UpstreamSettings, WorkspaceSettings
from proxy.observe.metrics import Metrics
from proxy.workspace.client import Workspace, WorkspaceSource
from proxy.workspace.credential import Credential
from proxy.workspace.minter import Minter
from proxy.workspace.outage import Outage
from proxy.workspace.resources import Instance, Resource
from proxy.workspace.single_flight import PendingCalls
from proxy.workspace.token_source import LocalTokenSource, TokenSource


@dataclass(frozen=True, slots=True)
class WorkspaceKey:
    """What a `Workspace` is made from: equal keys share one."""

    name: str
    settings: WorkspaceSettings
    credentials: CredentialsSettings


def workspace_key_of(settings: Settings, target: UpstreamSettings) -> WorkspaceKey:
    """Return the key of the workspace that a target with these effective settings belongs to."""
    return WorkspaceKey(target.workspace, settings.workspace_of(target), settings.credentials)


@dataclass(frozen=True, slots=True)
class AccountKey:
    """What shares tokens: the endpoints of a workspace, or one Provisioned instance.

    A token is good for every endpoint of its workspace, the documentation says. It does not say so
    of instances: each has tokens of its own.
    """

    workspace: WorkspaceKey
    instance: str

    @classmethod
    def of(cls, workspace: WorkspaceKey, resource: Resource | None) -> "AccountKey":
        """Return the key of the account that a resource's tokens belong to."""
        return cls(workspace, resource.name if isinstance(resource, Instance) else "")

    @property
    def name(self) -> str:
        """The name under which the account's token is shown."""
        section = self.workspace.name or "workspace"
        return f"{section}/{self.instance}" if self.instance else section


@dataclass(frozen=True, slots=True)
class TokenAccount:
    """One identity in one workspace, as far as its tokens are interchangeable."""

    name: str
    token_source: TokenSource
    minter: Minter | None
    outage: Outage | None = None
    """Both are None where another process mints."""


class WorkspaceRegistry(Protocol):
    """Where upstreams get their workspace and their tokens."""

    calls: PendingCalls
    """The calls to workspaces that are under way, look-ups of upstreams among them."""

    def workspace(self, key: WorkspaceKey) -> WorkspaceSource:
        """Return the workspace with this key."""

    def account(self, key: AccountKey, resources: list[Resource]) -> TokenAccount:
        """Return the account with this key. Its tokens are minted for one of these resources."""

    def look_up_outage(self, key: AccountKey) -> Outage:
        """Return the outage of look-ups for upstreams with a password, which have no account."""

    def use_of(self, key: AccountKey) -> AbstractContextManager[None]:
        """Return a context that counts a use of account and workspace while its block runs.

        It may be entered any number of times, and inside itself.
        """

    async def close(self) -> None:
        """Cancel the calls that are under way."""


class UseCount:
    """Counts uses, and closes what is used after the last of them; once.

    It may be entered again after that, which then counts nothing.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close
        self._count = 0
        self._closed = False

    def __enter__(self) -> None:
        """Count one more use."""
        self._count += 1

    def __exit__(self, *_: object) -> None:
        """Count one use less."""
        self._count -= 1
        if self._count == 0 and not self._closed:
            self._closed = True
            self._close()


class LocalWorkspaceRegistry:
    """The workspaces and accounts of this process."""

    def __init__(self, metrics: Metrics, *, version: str, retries: bool = True) -> None:
        """Without `retries`, report a connection to a workspace that fails at once."""
        self.calls = PendingCalls()
        self._retries = retries
        self._metrics = metrics
        self._version = version
        self._workspaces: dict[WorkspaceKey, Workspace] = {}
        self._accounts: dict[AccountKey, TokenAccount] = {}
        self._uses: dict[AccountKey, UseCount] = {}
        self._look_up_outages: dict[AccountKey, Outage] = {}

    def __len__(self) -> int:
        """The number of accounts in use."""
        return len(self._uses)

    async def close(self) -> None:
        """Cancel the calls that are under way."""
        await self.calls.close()

    def workspace(self, key: WorkspaceKey) -> Workspace:
        """Return the workspace with this key."""
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(
                key.settings,
                key.credentials,
                version=self._version,
                discover=not key.name,  # the environment's identity is that of [workspace]
                retries=self._retries,
            )
        return self._workspaces[key]

    def account(self, key: AccountKey, resources: list[Resource]) -> TokenAccount:
        """Return the account with this key. Its tokens are minted for one of these resources.

        An account that is in use mints for its earlier resources until it is offered others.
        """
        if key not in self._accounts:
            minter = Minter(self.workspace(key.workspace).mint, resources)
            mint = partial(_mint_in_use, minter, self.use_of(key))
            outage = Outage(key.name)
            token_source = LocalTokenSource(
                mint, key.workspace.credentials, self._metrics, self.calls, outage=outage
            )
            self._accounts[key] = TokenAccount(key.name, token_source, minter, outage)
        return self._accounts[key]

    def look_up_outage(self, key: AccountKey) -> Outage:
        """Return the outage of look-ups for upstreams with a password, which have no account."""
        return self._look_up_outages.setdefault(key, Outage(key.name))

    def use_of(self, key: AccountKey) -> UseCount:
        """Return what counts the uses of account and workspace, and closes them after the last."""
        if key not in self._uses:
            self._uses[key] = UseCount(partial(self._close, key))
        return self._uses[key]

    def _close(self, key: AccountKey) -> None:
        del self._uses[key]
        self._accounts.pop(key, None)
        self._look_up_outages.pop(key, None)
        if not any(other.workspace == key.workspace for other in self._uses):
            self._workspaces.pop(key.workspace, None)


async def _mint_in_use(minter: Minter, use: UseCount) -> Credential:
    """Mint, which is a use: an account that comes back meanwhile must not mint a second time."""
    with use:
        return await minter()
