"""The whole Lakebase emulator: clusters, a workspace with its tokens, a TLS gateway.

Composition only. Each shard has a cluster of its own, served by an Autoscaling endpoint and a
Provisioned instance.
"""

import hashlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from proxy.emulator.certificates import Certificate, Certificates
from proxy.emulator.cluster import CLIENT_ID, DATABASE, NATIVE_ROLE, Cluster, running
from proxy.emulator.endpoints import (
    AUTOSCALING_DOMAIN,
    PROVISIONED_DOMAIN,
    Dialect,
    Endpoint,
)
from proxy.emulator.gateway import Gateway
from proxy.emulator.held_port import LOOPBACK
from proxy.emulator.tokens import Purpose
from proxy.emulator.workspace import Workspace

CLIENT_SECRET: Final = "not-a-real-secret"  # noqa: S105 - as it says
PERSONAL_TOKEN: Final = "dapi-not-a-real-token"  # noqa: S105 - as it says
NATIVE_PASSWORD: Final = "not-a-real-password"  # noqa: S105 - as it says
SHARDS: Final = ("one", "two")
SHARDS_MAX: Final = 16  # each is a Postgres server
# The gateway does not listen on this loopback address. Tests use it as an address that refuses
# connections, beside a good one in a resolver's answer.
DEAD_ADDRESS: Final = "127.0.0.2"
LOCAL_HOST: Final = "localhost"  # the one name that every machine resolves


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: its cluster, and the endpoint and the instance that serve it."""

    name: str
    cluster: Cluster
    endpoint: Endpoint
    instance: Endpoint


class Lakebase:
    """The Lakebase emulator; use it with `async with`. Leaving the block removes everything."""

    client_id = CLIENT_ID
    client_secret = CLIENT_SECRET
    personal_token = PERSONAL_TOKEN
    native_role = NATIVE_ROLE
    native_password = NATIVE_PASSWORD
    database = DATABASE
    dead_address = DEAD_ADDRESS

    def __init__(
        self,
        shards: Sequence[str] = SHARDS,
        *,
        clusters: Mapping[str, Cluster] | None = None,
        clock: Callable[[], float] = time.time,
        gateway_port: int = 0,
    ) -> None:
        """`clusters`, by shard name, are running already and are left running; the emulator starts
        the others. `clock` returns seconds since the epoch and determines when tokens expire."""
        if not 0 < len(shards) <= SHARDS_MAX:
            raise ValueError(f"1 to {SHARDS_MAX} shards, not {len(shards)}")
        running = clusters or {}
        self._own_clusters = [Cluster(name) for name in shards if name not in running]
        by_name = {**running, **{cluster.shard: cluster for cluster in self._own_clusters}}
        self.shards = tuple(_shard(name, by_name[name]) for name in shards)
        self._clock = clock
        self._gateway_port = gateway_port
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(running(self._own_clusters))
            # A cluster's directory is removed even if this process is killed.
            directory = self.shards[0].cluster.directory
            self.ca_file = directory / f"ca-{secrets.token_hex(4)}.pem"
            stack.callback(self.ca_file.unlink, missing_ok=True)
            names = (f"*.{AUTOSCALING_DOMAIN}", f"*.{PROVISIONED_DOMAIN}", LOCAL_HOST, LOOPBACK)
            self.certificates = Certificates(names, self.ca_file)
            endpoints = [one for shard in self.shards for one in (shard.endpoint, shard.instance)]
            clients = {self.client_id: self.client_secret}
            self.workspace = await stack.enter_async_context(
                Workspace(endpoints, clients, clock=self._clock)
            )
            self.workspace.api.personal_tokens[self.personal_token] = self.client_id
            self.gateway = await stack.enter_async_context(
                Gateway(endpoints, self.certificates, self.workspace.api.issuer, self._gateway_port)
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def answer_to_localhost(self) -> None:
        """Make `localhost` the host of the first shard, for programs that look hosts up."""
        for one in (self.shards[0].endpoint, self.shards[0].instance):
            one.hosts["host"] = LOCAL_HOST

    @asynccontextmanager
    async def https(self) -> AsyncIterator[Workspace]:
        """Serve the workspace API over HTTPS, too, while the block runs."""
        tls = self.certificates.context(Certificate.GOOD)
        async with Workspace((), {}, clock=self._clock, tls=tls) as workspace:
            workspace.api = self.workspace.api
            yield workspace

    def __getitem__(self, name: str) -> Shard:
        """Return the shard of this name."""
        return next(shard for shard in self.shards if shard.name == name)

    def token(self, identity: str = CLIENT_ID, lifetime_seconds: float = 3600) -> str:
        """Return a database token for a direct login; it is not counted as a mint."""
        return self.workspace.api.issuer.issue(identity, Purpose.DATABASE, lifetime_seconds)

    def direct(self, endpoint: Endpoint) -> dict[str, str]:
        """Return libpq parameters that log in to an endpoint directly, with a new token."""
        return {
            "host": endpoint.host,
            "hostaddr": self.host_address,
            "port": str(self.port),
            "dbname": self.database,
            "user": self.client_id,
            "password": self.token(),
            "sslmode": "verify-full",
            "sslrootcert": str(self.ca_file),
            "gssencmode": "disable",
        }

    @property
    def workspace_url(self) -> str:
        """The value for DATABRICKS_HOST."""
        return self.workspace.url

    @property
    def host_address(self) -> str:
        """The address of every host name; no resolver knows the names."""
        return LOOPBACK

    @property
    def port(self) -> int:
        """The gateway's port, for all endpoints."""
        return self.gateway.port


def _shard(name: str, cluster: Cluster) -> Shard:
    """Return a shard with its endpoint and instance; its name determines their identifiers."""
    letters = hashlib.sha256(name.encode()).hexdigest()[:8]
    project = f"demo-{name}"
    endpoint = Endpoint(
        f"projects/{project}/branches/production/endpoints/primary",
        f"ep-{project}-{letters}",
        Dialect.AUTOSCALING,
        cluster,
    )
    uid = uuid.uuid5(uuid.NAMESPACE_DNS, project)
    instance = Endpoint(project, str(uid), Dialect.PROVISIONED, cluster)
    for one in (endpoint, instance):
        one.native_passwords[NATIVE_ROLE] = NATIVE_PASSWORD
    return Shard(name, cluster, endpoint, instance)
