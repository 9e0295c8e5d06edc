"""Tokens and hosts as a worker gets them: it asks the supervisor.

For: the workspaces and accounts of a worker's ways, in place of `upstream`'s own. Not for: the
answers (`credential_service`), when to mint, or what a failure means (`upstream`).

Invariants: a token of one workspace cannot meet a host of another: whoever asks names the
configuration that it dials by, and is answered from that one or refused. A worker keeps no token
longer than it takes to dial.
"""

import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final

from proxy.config import CredentialsSettings, Settings
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workers.rpc import RpcConnection, RpcConnectionLost
from proxy.workspace.client import Identity
from proxy.workspace.credential import Credential
from proxy.workspace.freshness import Freshness, is_fresh
from proxy.workspace.registry import AccountKey, TokenAccount, WorkspaceKey, workspace_key_of
from proxy.workspace.resources import Resource, ResourceStatus
from proxy.workspace.single_flight import PendingCalls
from proxy.workspace.token_source import REJECTION_SECONDS_MIN

# A session that began to dial before a reload goes on by what it began with. More reloads than
# this within upstream.connect_timeout_seconds are somebody's loop.
CONFIGURATIONS_MAX: Final = 4

Call = Callable[..., Awaitable[Any]]


class RemoteWorkspaceRegistry:
    """The accounts of the supervisor, by the configurations that it has numbered."""

    def __init__(self, rpc: RpcConnection) -> None:
        self._rpc = rpc
        # In which configuration each was last: a way that a reload leaves as it is asks by the
        # newest, one that was replaced by the last that it was in.
        self._generations: dict[WorkspaceKey, int] = {}
        self.calls = PendingCalls()

    def register(self, generation: int, settings: Settings) -> None:
        """Call by these settings, this generation of the supervisor's, from now on."""
        for name in settings.target_names():
            self._generations[workspace_key_of(settings, settings.target(name))] = generation
        oldest = generation - CONFIGURATIONS_MAX + 1
        self._generations = {
            known: last for known, last in self._generations.items() if last >= oldest
        }

    async def close(self) -> None:
        """End what is being asked for."""
        await self.calls.close()

    def workspace(self, key: WorkspaceKey) -> "RemoteWorkspace":
        """Return the workspace with this key."""
        return RemoteWorkspace(partial(self._call, key))

    def account(self, key: AccountKey, resources: list[Resource]) -> TokenAccount:
        """Return the account with this key; the supervisor knows its resources."""
        credentials = RemoteCredentials(
            partial(self._call, key.workspace, "fresh", instance=key.instance),
            partial(self._notify, key.workspace, "reject", instance=key.instance),
            key.workspace.credentials,
        )
        return TokenAccount(key.name, credentials, None)

    def use_of(self, key: AccountKey) -> AbstractContextManager[None]:
        """Return a context that does nothing: the supervisor counts the uses."""
        return nullcontext()

    async def _call(self, workspace_key: WorkspaceKey, name: str, **arguments: object) -> Any:
        try:
            return await self._rpc.call(name, **self._scope(workspace_key), **arguments)
        except RpcConnectionLost:
            raise ProxyError(ErrorKind.SHUTTING_DOWN) from None

    def _notify(self, workspace_key: WorkspaceKey, name: str, **arguments: object) -> None:
        self._rpc.notify(name, **self._scope(workspace_key), **arguments)

    def _scope(self, workspace_key: WorkspaceKey) -> dict[str, object]:
        # One that is known no more is answered as one of long ago: with a refusal.
        return {
            "configuration": self._generations.get(workspace_key, 0),
            "workspace": workspace_key.name,
        }


class RemoteCredentials:
    """The tokens of an account of the supervisor."""

    newest = None  # whoever mints shows its age

    def __init__(
        self, call: Call, reject: Callable[..., None], settings: CredentialsSettings
    ) -> None:
        self._call = call
        self._reject = reject
        self._freshness = Freshness(settings.token_max_age_seconds, settings.expiry_margin_seconds)
        self._latest_at = self._rejected_at = -math.inf

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError."""
        content = await self._call()
        secret = Secret(content["secret"].encode())
        self._latest_at = max(self._latest_at, content["requested_at"])
        return Credential(secret, content["requested_at"], content["expires_at"])

    def is_fresh(self, credential: Credential) -> bool:
        """Whether a credential that was got some time ago may still be shown."""
        return is_fresh(credential, time.time(), self._freshness)

    def reject(self, credential: Credential) -> bool:
        """Tell that an upstream refused a credential: whether the next one will be another.

        The supervisor's answer is not waited for. Its rule is kept here as well, for this worker:
        one that replaced another a moment ago is not the fault.
        """
        if credential.requested_at < self._latest_at:
            return True
        now = time.time()
        if 0 <= now - self._rejected_at < REJECTION_SECONDS_MIN:
            return False
        self._rejected_at = now
        self._reject(requested_at=credential.requested_at)
        return True


class RemoteWorkspace:
    """A workspace, asked by the supervisor."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def status(self, resource: Resource) -> ResourceStatus:
        """Return state and host of a resource. Raises ProxyError."""
        read_only = resource.read_only
        content = await self._call("status", resource=resource.name, read_only=read_only)
        return ResourceStatus(*content)

    async def identity(self) -> Identity:
        """Return who we are there. Raises ProxyError."""
        return Identity(*await self._call("identity"))

    async def clock_ahead_seconds(self) -> float | None:
        """Say that it is not known: `check` asks for it, which has no workers."""
        return None
