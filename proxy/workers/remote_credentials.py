"""A worker's side of tokens, hosts and identities: it asks the supervisor.

For: the workspaces and accounts of a worker's upstreams, in place of `LocalWorkspaceRegistry`. Not
for: the answers (`credential_service`), when to mint, or what a failure means (`workspace`).

Invariants: a token of one workspace cannot meet a host of another: each call names the generation
of the configuration that its session dials by, and is answered from that one or refused. A worker
keeps no token longer than a dial lasts.
"""

import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final

from proxy.config import CredentialsSettings, Settings
from proxy.errors import ErrorKind, ProxyError
from proxy.wire.secret import Secret
from proxy.workers.rpc import RpcConnection, RpcConnectionLost
from proxy.workspace.client import Identity
from proxy.workspace.credential import Credential
from proxy.workspace.freshness import Freshness, is_fresh
from proxy.workspace.outage import Outage
from proxy.workspace.registry import AccountKey, TokenAccount, WorkspaceKey, workspace_key_of
from proxy.workspace.resources import Resource, ResourceStatus
from proxy.workspace.single_flight import PendingCalls
from proxy.workspace.token_source import REJECTION_SECONDS_MIN

# A session that started to dial before a reload goes on by the configuration that it started with.
# More reloads than this within upstream.connect_timeout_seconds are not expected.
GENERATIONS_MAX: Final = 4

CallSupervisor = Callable[..., Awaitable[Any]]


class RemoteWorkspaceRegistry:
    """The supervisor's workspaces and accounts, by the generations of its configuration."""

    def __init__(self, rpc: RpcConnection) -> None:
        self._rpc = rpc
        # The newest generation that contains each workspace. Calls name it, so that an upstream
        # of an older configuration is still answered.
        self._generations: dict[WorkspaceKey, int] = {}
        self.calls = PendingCalls()

    def register(self, generation: int, settings: Settings) -> None:
        """Ask by these settings, which are the supervisor's of this generation, from now on."""
        targets = [settings.target(name) for name in settings.target_names()]
        if settings.catalogue_map:  # a shard may be in any of them
            targets += [
                settings.upstream.model_copy(update={"workspace": name})
                for name in ("", *settings.workspaces)
            ]
        for target in targets:
            self._generations[workspace_key_of(settings, target)] = generation
        oldest = generation - GENERATIONS_MAX + 1
        self._generations = {key: last for key, last in self._generations.items() if last >= oldest}

    async def close(self) -> None:
        """Cancel the calls that are open."""
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

    def look_up_outage(self, key: AccountKey) -> Outage:
        """Return an outage of look-ups that is not logged: the supervisor does so."""
        return Outage(key.name, words=None)

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
        # No generation is 0: what is asked for a workspace that is no longer known is refused.
        return {
            "generation": self._generations.get(workspace_key, 0),
            "workspace": workspace_key.name,
        }


class RemoteCredentials:
    """The tokens of one of the supervisor's accounts."""

    newest = None  # the supervisor, which mints, shows its age

    def __init__(
        self, call: CallSupervisor, reject: Callable[..., None], settings: CredentialsSettings
    ) -> None:
        self._call = call
        self._reject = reject
        self._freshness = Freshness(settings.token_max_age_seconds, settings.expiry_margin_seconds)
        self._latest_at = self._rejected_at = -math.inf

    @property
    def accepted_age_seconds(self) -> float:
        """The age up to which a token is used, as the supervisor last reported."""
        return self._freshness.max_age_seconds

    async def fresh(self) -> Credential:
        """Return a credential to log in with now. Raises ProxyError."""
        content = await self._call()
        secret = Secret(content["secret"].encode())
        self._latest_at = max(self._latest_at, content["requested_at"])
        self._freshness = replace(self._freshness, max_age_seconds=content["accepted_age_seconds"])
        return Credential(secret, content["requested_at"], content["expires_at"])

    def is_fresh(self, credential: Credential) -> bool:
        """Return whether a credential that was got some time ago may still be used."""
        return is_fresh(credential, time.time(), self._freshness)

    def reject(self, credential: Credential) -> bool:
        """Invalidate a refused credential. Return whether a retry would use a different one.

        The supervisor's answer is not waited for. This worker applies the supervisor's rule itself:
        a token that replaced another a moment ago is not at fault.
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
    """A workspace, asked through the supervisor."""

    def __init__(self, call: CallSupervisor) -> None:
        self._call = call

    async def status(self, resource: Resource) -> ResourceStatus:
        """Return state and host of a resource. Raises ProxyError."""
        kind = {"read_only": resource.read_only, "pooled": resource.pooled}
        content = await self._call("status", resource=resource.name, **kind)
        return ResourceStatus(*content)

    async def identity(self) -> Identity:
        """Return who we are in this workspace. Raises ProxyError."""
        return Identity(*await self._call("identity"))

    async def clock_ahead_seconds(self) -> float | None:
        """Return None, for unknown: only `check` asks for it, which has no workers."""
        return None
