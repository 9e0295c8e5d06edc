"""The endpoints that the workspace lists and the gateway serves: hosts, limits, suspend and wake.

An endpoint is one compute in front of one cluster, Autoscaling or Provisioned; the two word errors
differently. Tests set its attributes to create a scenario; they may change at any time.

Not emulated: billing, autoscaling itself, replicas with data of their own (every host of an
endpoint serves the same database).
"""

import asyncio
import time
from collections import deque
from enum import Enum, auto
from typing import Final, Protocol

from proxy.emulator.cluster import CLIENT_ID, GROUP, PERSON, Cluster
from proxy.emulator.faults import FaultList
from proxy.wire.messages import ErrorResponse

AUTOSCALING_DOMAIN: Final = "database.eu-west-1.cloud.databricks.com"
PROVISIONED_DOMAIN: Final = "database.cloud.databricks.com"
POOLER_SUFFIX: Final = "-pooler"

# Neon's own retries while a compute wakes: 8 times 100 ms x 1.6^n, about 7 s in all.
WAKE_TIMEOUT_SECONDS: Final = 7.0


class Dialect(Enum):
    """How errors are worded, and which startup parameters are passed on."""

    AUTOSCALING = auto()  # Neon's: ERROR, no V, XX000, single quotes
    PROVISIONED = auto()  # Postgres': FATAL, SQLSTATE, double quotes


class SessionEnd(Enum):
    """How a suspend, a failover or a limit ends a session."""

    ADMIN_SHUTDOWN = auto()  # FATAL 57P01, then close_notify and FIN
    CLOSE = auto()  # close_notify and FIN
    END_OF_FILE = auto()  # a bare FIN
    RESET = auto()  # RST
    SILENCE = auto()  # nothing: what the client sends is not answered


class EmulatedSession(Protocol):
    """A session, for its endpoint."""

    def end(self, how: SessionEnd) -> None:
        """Start to end the session; it ends a moment later."""

    def demote(self) -> None:
        """Report from the next ReadyForQuery on that the session's server is a standby."""

    async def say(self, content: bytes) -> None:
        """Send bytes that are not Postgres'."""


class Endpoint:
    """One compute: what the API reports of it, and how it treats connections."""

    def __init__(self, name: str, uid: str, dialect: Dialect, cluster: Cluster) -> None:
        """`name` is the resource name, or a Provisioned instance's name."""
        self.name = name
        self.uid = uid
        self.dialect = dialect
        # Which API lists it. An instance that is upgraded in place changes its dialect alone.
        self.listed_as = dialect
        self.cluster = cluster
        self.hosts = _hosts(uid, dialect)
        self.hidden_hosts: set[str] = set()  # fields of `hosts` that the API leaves out
        self.kind = "ENDPOINT_TYPE_READ_WRITE"
        self.disabled = False
        self.state_override: str | None = None  # changes what the API reports, not what happens

        # The members of group roles. They may log in as the role, beside the role's own identity.
        self.members: dict[str, set[str]] = {GROUP: {CLIENT_ID, PERSON}}
        # Native passwords by role; used on pooled hosts, and on others if `native_login` is set.
        self.native_passwords: dict[str, str] = {}
        self.native_login = False
        # Pooled hosts ask for SASL, which takes no token; True: for a token or password in clear.
        self.pooler_takes_tokens = False
        # Errors for the next logins with a valid token, of any identity.
        self.refusals: FaultList[None, ErrorResponse] = FaultList()

        self.passes_real_key = False
        self.keeps_backend = False  # Postgres does not see that a client has disconnected
        self.readable_secondaries = False
        self.wake_seconds = 0.0
        self.wake_timeout_seconds = WAKE_TIMEOUT_SECONDS
        self.wake_error: ErrorResponse | None = None  # default: as the dialect words it
        self.suspend_after_seconds: float | None = None
        self.suspend_end = SessionEnd.ADMIN_SHUTDOWN
        self.sessions_max: int | None = None
        self.connects_per_second_max: int | None = None
        self.idle_seconds_max: float | None = None  # 24 hours in Lakebase
        self.idle_end = SessionEnd.CLOSE
        self.lifetime_seconds_max: float | None = None  # 3 days in Lakebase

        self.wakes = 0
        self.sasl_failures = 0  # pooled hosts refuse logins after some
        self.last_activity = time.monotonic()  # of any session
        self.sessions: set[EmulatedSession] = set()
        self.slots = 0  # connections past authentication, sessions included
        self._asleep = False
        self._awake_at: float | None = None  # set while waking
        self._connects: deque[float] = deque()  # of the last second

    @property
    def host(self) -> str:
        """The host for ordinary read-write connections."""
        return self.hosts["host"]

    @property
    def pooled_host(self) -> str:
        """The host of the connection pooler; Autoscaling only."""
        return self.hosts["read_write_pooled_host"]

    @property
    def state(self) -> str:
        """The state as the API reports it."""
        if self.state_override is not None:
            return self.state_override
        self._suspend_if_idle()
        is_endpoint = self.listed_as is Dialect.AUTOSCALING
        asleep, awake = ("IDLE", "ACTIVE") if is_endpoint else ("STOPPED", "AVAILABLE")
        if self._waking_seconds() > 0:
            return "INIT" if is_endpoint else "STARTING"
        return asleep if self._asleep else awake

    def refuse(self, error: ErrorResponse, times: int | None = 1) -> None:
        """Answer the next `times` logins with this error, even with a valid token."""
        self.refusals.add(None, error, times)

    def suspend(self) -> None:
        """Suspend the compute and end its sessions as `suspend_end` says; a login wakes it."""
        self._asleep, self._awake_at = True, None
        self.end_sessions(self.suspend_end)

    def fail_over(self, seconds: float, how: SessionEnd = SessionEnd.ADMIN_SHUTDOWN) -> None:
        """End the sessions. For `seconds`, logins wait or fail; then the new primary serves."""
        self._asleep, self._awake_at = False, time.monotonic() + seconds
        self.end_sessions(how)

    def promote_another(self) -> None:
        """Make another server the primary: sessions that are open stay on a standby."""
        for session in self.sessions:
            session.demote()

    def add_login_trigger(self, expression: str) -> None:
        """Evaluate an SQL expression at each login. Raises ClusterError before version 17."""
        self.cluster.execute(
            "CREATE FUNCTION public.at_login() RETURNS event_trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN PERFORM {expression}; END $$;"
            " CREATE EVENT TRIGGER at_login ON login EXECUTE FUNCTION public.at_login();"
        )

    async def say(self, content: bytes) -> None:
        """Send bytes that are not Postgres' to every session."""
        for session in list(self.sessions):
            await session.say(content)

    def end_sessions(self, how: SessionEnd = SessionEnd.ADMIN_SHUTDOWN) -> None:
        """End every session."""
        for session in list(self.sessions):
            session.end(how)

    def admits_connect(self) -> bool:
        """Count a connection attempt. Return whether it is within the rate limit."""
        now = time.monotonic()
        while self._connects and self._connects[0] <= now - 1:
            self._connects.popleft()
        self._connects.append(now)
        limit = self.connects_per_second_max
        return limit is None or len(self._connects) <= limit

    async def wake(self) -> bool:
        """Wake the compute if it is suspended, and wait for it. Return False on timeout."""
        self._suspend_if_idle()
        self.last_activity = time.monotonic()
        if self._asleep:
            self.wakes += 1
            self._asleep = False
            self._awake_at = time.monotonic() + self.wake_seconds
        waking = self._waking_seconds()
        if waking > 0:
            await asyncio.sleep(min(waking, self.wake_timeout_seconds))
        return waking <= self.wake_timeout_seconds

    def waking_error(self) -> ErrorResponse:
        """Return the error for a login whose wait for the compute timed out."""
        if self.wake_error is not None:
            return self.wake_error
        if self._autoscaling:
            return neon_error("Couldn't connect to compute node")
        return ErrorResponse.fatal("57P03", "the database system is starting up")

    def host_kind(self, host: str) -> str | None:
        """Return the field of `hosts` that has this name, or None."""
        return next((kind for kind, name in self.hosts.items() if name == host), None)

    @property
    def _autoscaling(self) -> bool:
        return self.dialect is Dialect.AUTOSCALING

    def _waking_seconds(self) -> float:
        if self._awake_at is None:
            return 0.0
        return self._awake_at - time.monotonic()

    def _suspend_if_idle(self) -> None:
        """Suspend the compute after enough time without traffic; an open session is no traffic."""
        limit = self.suspend_after_seconds
        if limit is not None and time.monotonic() - self.last_activity >= limit:
            self.suspend()


def neon_error(text: str) -> ErrorResponse:
    """Return an error as Neon's proxy words every error: no V, always XX000."""
    return ErrorResponse(((b"S", b"ERROR"), (b"C", b"XX000"), (b"M", text.encode())))


def _hosts(uid: str, dialect: Dialect) -> dict[str, str]:
    """Return the host names by the API's field for each."""
    if dialect is Dialect.PROVISIONED:
        return {
            "host": f"instance-{uid}.{PROVISIONED_DOMAIN}",
            "read_only_host": f"instance-ro-{uid}.{PROVISIONED_DOMAIN}",
        }
    return {
        "host": f"{uid}.{AUTOSCALING_DOMAIN}",
        "read_only_host": f"{uid}-ro.{AUTOSCALING_DOMAIN}",
        "read_write_pooled_host": f"{uid}{POOLER_SUFFIX}.{AUTOSCALING_DOMAIN}",
        "read_only_pooled_host": f"{uid}-ro{POOLER_SUFFIX}.{AUTOSCALING_DOMAIN}",
    }
