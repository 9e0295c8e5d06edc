"""The resources for which a credential is minted and a host is looked up: endpoint or instance.

Autoscaling (the SDK's `postgres` service) and Provisioned (its `database` service) differ in the
calls and in the names of the reply's fields, all of which are optional.
"""

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol

from proxy.config import UpstreamSettings
from proxy.errors import ErrorKind
from proxy.workspace.sdk_import import WorkspaceClient

# Failures of the one resource that was named. Any other failure would be the same for the next.
OF_ONE_RESOURCE: Final = frozenset(
    (
        ErrorKind.ENDPOINT_NOT_FOUND,
        ErrorKind.ENDPOINT_INVALID,
        ErrorKind.INSTANCE_NOT_FOUND,
        ErrorKind.INSTANCE_INVALID,
        ErrorKind.PERMISSION_DENIED,
    )
)


@dataclass(frozen=True, slots=True)
class Minted:
    """The reply to a credential call, not validated: the token may be anything.

    `expires_at` is in seconds since the epoch.
    """

    token: object = field(repr=False)
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    """State and host in the API's reply, not validated. `host` is empty if there is none (yet)."""

    state: str
    host: object
    disabled: bool


class Resource(Protocol):
    """An endpoint or an instance. The methods block; they are called in a thread."""

    @property
    def name(self) -> str:
        """The resource's name, as the settings give it."""

    @property
    def read_only(self) -> bool:
        """Whether the read-only host is used."""

    @property
    def pooled(self) -> bool:
        """Whether the pooled host is used."""

    def mint(self, client: WorkspaceClient) -> Minted:
        """Request a credential."""

    def status(self, client: WorkspaceClient) -> ResourceStatus:
        """Request state and host."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An Autoscaling endpoint: projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT."""

    name: str
    read_only: bool = False
    pooled: bool = False

    def mint(self, client: WorkspaceClient) -> Minted:
        """Request a credential, by the endpoint alone: other arguments differ between versions."""
        reply = client.postgres.generate_database_credential(endpoint=self.name)
        expiry = reply.expire_time
        return Minted(reply.token, None if expiry is None else expiry.ToNanoseconds() / 1e9)

    def status(self, client: WorkspaceClient) -> ResourceStatus:
        """Request state and host. A read replica is an endpoint of its own, with a plain host."""
        status = client.postgres.get_endpoint(name=self.name).status
        hosts = getattr(status, "hosts", None)
        host = getattr(hosts, self._host_field(), None)
        state = getattr(status, "current_state", None)
        return ResourceStatus(
            str(getattr(state, "value", "unknown")),
            host or "",
            bool(getattr(status, "disabled", False)),
        )

    def _host_field(self) -> str:
        if self.pooled:
            return "read_only_pooled_host" if self.read_only else "read_write_pooled_host"
        return "read_only_host" if self.read_only else "host"


@dataclass(frozen=True, slots=True)
class Instance:
    """A Provisioned instance, by name."""

    name: str
    read_only: bool = False
    pooled: bool = False  # its API names no pooled host

    def mint(self, client: WorkspaceClient) -> Minted:
        """Request a credential; its expiry is text."""
        reply = client.database.generate_database_credential(
            instance_names=[self.name], request_id=str(uuid.uuid4())
        )
        return Minted(reply.token, _seconds(reply.expiration_time))

    def status(self, client: WorkspaceClient) -> ResourceStatus:
        """Request state and host."""
        instance = client.database.get_database_instance(name=self.name)
        host = instance.read_only_dns if self.read_only else instance.read_write_dns
        state = instance.state
        return ResourceStatus("unknown" if state is None else state.value, host or "", False)


def _seconds(text: object) -> float | None:
    """Return seconds since the epoch, None if the text is no time. Without offset it is UTC."""
    try:
        moment = datetime.fromisoformat(str(text))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def resource_of(settings: UpstreamSettings) -> Resource | None:
    """Return the resource that the settings name, if any."""
    if settings.endpoint:
        return Endpoint(settings.endpoint, settings.read_only, settings.pooled)
    if settings.instance:
        return Instance(settings.instance, settings.read_only)
    return None
