"""The sections about this process: listener, admin address, startup, shutdown, reload, log.

For: `[listen]`, `[admin]`, `[startup]`, `[shutdown]`, `[reload]`, `[log]`. Not for: what is
upstream.

Invariant: a section that is valid can be used on its own.
"""

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from proxy.addresses import address_of, is_loopback
from proxy.config.validators import (
    Marker,
    Section,
    WatchedFileName,
    check_directory,
    check_host,
    check_mode,
    join_list,
    or_empty,
)

NEEDS_RESTART: Final = Marker.NEEDS_RESTART

# Sessions are checked several times in this time; more often would slow down the others.
_IDLE_TIMEOUT_SECONDS_MIN: Final = 0.1

StartupRequirement = Literal["token", "none"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _check_idle_timeout(value: float) -> float:
    if 0 < value < _IDLE_TIMEOUT_SECONDS_MIN:
        raise ValueError(f"must be 0 (never) or at least {_IDLE_TIMEOUT_SECONDS_MIN:g}")
    return value


_HOSTS_MAX: Final = 32  # each is a socket


def _check_hosts(value: str) -> str:
    hosts = [host.strip() for host in value.split(",")]
    if len(hosts) > _HOSTS_MAX:
        raise ValueError(f"must not be more than {_HOSTS_MAX} addresses")
    return ",".join(host if host == "*" else check_host(host) for host in hosts)


_IdleTimeout = Annotated[float, AfterValidator(_check_idle_timeout), NEEDS_RESTART]


class ListenSettings(Section):
    """Where clients connect."""

    host: Annotated[str, BeforeValidator(join_list), or_empty(_check_hosts), NEEDS_RESTART] = Field(
        default="localhost",
        description="Addresses and host names to listen on, as a list or with commas between them. "
        "localhost: both loopback addresses, as far as this machine has them. * or ::: all "
        "addresses, of both families. Every client that can reach one is logged "
        "in as the proxy's identity, so all must be loopback unless allow_remote is set. Empty: no "
        "TCP, only the unix socket.",
    )
    port: Annotated[int, NEEDS_RESTART] = Field(
        default=5432,
        ge=0,
        le=65535,
        description="TCP port, and the number in the unix socket's name. 5432 is the default of "
        "every driver; 0 takes a free port.",
    )
    unix_socket_directory: Annotated[str, or_empty(check_directory), NEEDS_RESTART] = Field(
        default="",
        description="Directory of an additional unix socket, .s.PGSQL.PORT, where drivers look "
        "for it. File permissions then decide who can connect. Empty: no unix socket.",
    )
    unix_socket_mode: Annotated[str, AfterValidator(check_mode), NEEDS_RESTART] = Field(
        default="0600",
        description="Permissions of the unix socket, in octal. 0600: only processes of the same "
        "user.",
    )
    allow_remote: Annotated[bool, NEEDS_RESTART] = Field(
        default=False,
        description="Allows a host that is not loopback. The proxy requests no password from "
        "clients: set it only where the network itself decides who can connect.",
    )
    tls: Literal["", "self-signed"] = Field(
        default="",
        description="self-signed: the listener has a certificate that is made in memory at the "
        "start, for applications with sslmode=require built in, which verifies none. Empty: TLS "
        "only with tls_certificate. It is off by default because drivers with sslmode=prefer would "
        "then use TLS on loopback.",
    )
    tls_certificate: WatchedFileName = Field(
        default="",
        description="PEM file with the listener's certificate chain, for drivers that require TLS "
        "(sslmode=require). Needs tls_key. Empty: the listener offers no TLS.",
    )
    tls_key: WatchedFileName = Field(
        default="",
        description="PEM file with the private key of tls_certificate.",
    )
    max_connections: Annotated[int, NEEDS_RESTART] = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Maximum number of client connections; another one is refused with 53300. "
        "Each uses two file descriptors of the proxy and a connection slot of the database, which "
        "has 104 to 3357.",
    )
    workers: Annotated[int, NEEDS_RESTART] = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of processes that share the sessions of run evenly. Each uses one "
        "core, which is enough for about 20,000 transactions per second. More than one need about "
        "20 MB in addition, and 12 MB for each. max_connections still bounds all of them "
        "together, and upstream.connects_max is divided among them, rounded up.",
    )
    startup_timeout_seconds: Annotated[float, NEEDS_RESTART] = Field(
        default=15,
        ge=0.1,
        le=600,
        description="Time limit for a client's StartupMessage, in seconds. Drivers need "
        "milliseconds; a connection that sends nothing must not occupy a slot.",
    )
    idle_timeout_seconds: _IdleTimeout = Field(
        default=0,
        ge=0,
        le=604_800,
        description="Time after which an idle session is ended with 57P05, in seconds, at least "
        "0.1; 0 is never. For applications that leak connections; if the application has a pool, "
        "use the pool's own limit.",
    )

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses and names of `host`."""
        return tuple(self.host.split(",")) if self.host else ()

    @field_validator("port")
    @classmethod
    def _socket_has_a_number(cls, value: int, info: ValidationInfo) -> int:
        if not value and info.data.get("host") == "":
            raise ValueError("must not be 0 if listen.host is empty: it names the unix socket")
        return value

    @field_validator("unix_socket_directory")
    @classmethod
    def _clients_can_connect(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.data.get("host") == "":
            raise ValueError("required if listen.host is empty: else no client could connect")
        return value

    @field_validator("tls_certificate")
    @classmethod
    def _one_certificate(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("tls"):
            raise ValueError("must not be set together with listen.tls")
        return value

    @field_validator("tls_key")
    @classmethod
    def _key_and_certificate(cls, value: str, info: ValidationInfo) -> str:
        if bool(value) != bool(info.data.get("tls_certificate")):
            raise ValueError("must be set if listen.tls_certificate is, and only then")
        return value

    @field_validator("allow_remote")
    @classmethod
    def _remote_is_allowed(cls, value: bool, info: ValidationInfo) -> bool:
        hosts = str(info.data.get("host", "")).split(",")
        remote = [host for host in hosts if host and not is_loopback(host)]
        if remote and not value:
            host = ", ".join(remote)
            raise ValueError(
                f"must be true because listen.host {host} is not loopback: any client that can"
                " reach it is logged in without a password"
            )
        return value


class AdminSettings(Section):
    """Where health and metrics are served over HTTP. It never opens an upstream connection."""

    enabled: Annotated[bool, NEEDS_RESTART] = Field(
        default=True, description="Serves the admin address."
    )
    host: Annotated[str, AfterValidator(check_host), NEEDS_RESTART] = Field(
        default="127.0.0.1",
        description="Address or host name to listen on. It shows no secret, but it shows usage: "
        "0.0.0.0 lets a Kubernetes probe or a scraper reach it.",
    )
    port: Annotated[int, NEEDS_RESTART] = Field(
        default=9090,
        ge=0,
        le=65535,
        description="TCP port; 0 takes a free one.",
    )
    quit: Annotated[bool, NEEDS_RESTART] = Field(
        default=False,
        description="Accepts POST /quitquitquit from loopback, which drains as SIGTERM does: for "
        "a job whose sidecar must end with its application. Also DELETE /sessions/ID, which ends "
        "one session.",
    )

    @field_validator("quit")
    @classmethod
    def _quit_is_reachable(cls, value: bool, info: ValidationInfo) -> bool:
        address = address_of(info.data.get("host", ""))
        if value and address and not (address.is_loopback or address.is_unspecified):
            raise ValueError(
                "accepts requests from loopback only, which cannot reach admin.host: set that to"
                " 127.0.0.1 or to 0.0.0.0"
            )
        return value


class StartupSettings(Section):
    """When `/startup` of the admin address and `wait` succeed, and systemd is told READY."""

    require: Annotated[StartupRequirement, NEEDS_RESTART] = Field(
        default="token",
        description='"token": as soon as each workspace has issued a token, so that a rollout with '
        'a wrong secret stops. "none": as soon as the proxy listens. Neither resumes a database, '
        "and readiness does not depend on it.",
    )


class ShutdownSettings(Section):
    """How SIGTERM and SIGINT stop the proxy."""

    accept_seconds: float = Field(
        default=0,
        ge=0,
        le=3600,
        description="Time for which new connections are still accepted after the signal, in "
        "seconds, while readiness already fails: load balancers and applications notice with a "
        "delay.",
    )
    drain_seconds: float = Field(
        default=30,
        ge=0,
        le=86400,
        description="Time for sessions to end by themselves, in seconds; then they are cut. "
        "Kubernetes kills a pod 30 seconds after SIGTERM unless terminationGracePeriodSeconds is "
        "longer.",
    )


class ReloadSettings(Section):
    """When the configuration is read again, other than by SIGHUP and POST /reload."""

    watch: bool = Field(
        default=False,
        description="Reloads a few seconds after the configuration's file, or a file that it "
        "names, has changed: mappings, certificates, secrets. It is for Kubernetes, which renews "
        "the files of a ConfigMap or Secret and sends no signal.",
    )


# A word that services can index; the other keys of a line have such names too.
LOG_KEY_PATTERN: Final = r"^[A-Za-z][A-Za-z0-9_]{0,63}$"


class LogSettings(Section):
    """What is logged to standard error. Tokens, passwords and cancel keys never are."""

    format: Annotated[LogFormat, NEEDS_RESTART] = Field(
        default="auto",
        description="auto: console on a terminal, else json, one object per line.",
    )
    level: LogLevel = Field(default="info", description="The least severe level that is logged.")
    event_key: str = Field(
        default="event",
        pattern=LOG_KEY_PATTERN,
        description="The key of a line's event in JSON. Some services want message.",
    )
    level_key: str = Field(
        default="level",
        pattern=LOG_KEY_PATTERN,
        description="The key of a line's level in JSON. Some services want severity.",
    )

    @field_validator("level", mode="before")
    @classmethod
    def _in_any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value  # many programs write INFO

    @field_validator("level_key")
    @classmethod
    def _differs_from_event_key(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("event_key"):
            raise ValueError("must differ from log.event_key")
        return value
