"""What a credential is minted for and a host looked up from: an endpoint or an instance.

Autoscaling (the SDK's `postgres` service) and Provisioned (its `database` service) differ in the
calls and in the names of the reply's fields, all of which are optional.
"""

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from proxy.config import UpstreamSettings
from proxy.workspace.sdk_import import WorkspaceClient


@dataclass(frozen=True, slots=True)
class Minted:
    """A reply to a credential call, as it came: either may be missing, and the token no text.

    `expires_at` is in seconds since the epoch.
    """

    token: object = field(repr=False)
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    """What the API says of a resource, as it came. `host` is empty where it names none (yet)."""

    state: str
    host: object
    disabled: bool


class Resource(Protocol):
    """Either kind. The methods block: they are called in a thread, with an SDK client."""

    @property
    def name(self) -> str:
        """The resource's name, as the settings give it."""

    @property
    def read_only(self) -> bool:
        """Whether its read-only host is meant."""

    def mint(self, client: WorkspaceClient) -> Minted:
        """Ask for a credential."""

    def status(self, client: WorkspaceClient) -> ResourceStatus:
        """Ask for state and host."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An Autoscaling endpoint: projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT."""

    name: str
    read_only: bool = False

    def mint(self, client: WorkspaceClient) -> Minted:
        """Ask for a credential; the endpoint alone, as other arguments came and went."""
        reply = client.postgres.generate_database_credential(endpoint=self.name)
        expiry = reply.expire_time
        return Minted(reply.token, None if expiry is None else expiry.ToNanoseconds() / 1e9)

    def status(self, client: WorkspaceClient) -> ResourceStatus:
        """Ask for state and host; a read replica is an endpoint of its own, with a plain host."""
        status = client.postgres.get_endpoint(name=self.name).status
        hosts = getattr(status, "hosts", None)
        host = getattr(hosts, "read_only_host" if self.read_only else "host", None)
        state = getattr(status, "current_state", None)
        return ResourceStatus(
            str(getattr(state, "value", "unknown")),
            host or "",
            bool(getattr(status, "disabled", False)),
        )


@dataclass(frozen=True, slots=True)
class Instance:
    """A Provisioned instance, by name."""

    name: str
    read_only: bool = False

    def mint(self, client: WorkspaceClient) -> Minted:
        """Ask for a credential; its expiry comes as text."""
        reply = client.database.generate_database_credential(
            instance_names=[self.name], request_id=str(uuid.uuid4())
        )
        return Minted(reply.token, _seconds(reply.expiration_time))

    def status(self, client: WorkspaceClient) -> ResourceStatus:
        """Ask for state and host."""
        instance = client.database.get_database_instance(name=self.name)
        host = instance.read_only_dns if self.read_only else instance.read_write_dns
        state = instance.state
        return ResourceStatus("unknown" if state is None else state.value, host or "", False)


def _seconds(text: object) -> float | None:
    """Return a moment in seconds since the epoch; None if it is none. Without offset it is UTC."""
    try:
        moment = datetime.fromisoformat(str(text))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def resource_of(settings: UpstreamSettings) -> Resource | None:
    """Return what the settings name, if they name any."""
    if settings.endpoint:
        return Endpoint(settings.endpoint, settings.read_only)
    if settings.instance:
        return Instance(settings.instance, settings.read_only)
    return None
