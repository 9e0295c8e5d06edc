"""The settings model: every key with its default, unit, bounds and the reason for them.

For: one `Settings`, validated and frozen. A new key is one `Field` here: flags, environment, file,
help text and `config.example.toml` follow from it. Not for: reading any of these (`sources`), or
acting on a setting.

Invariant: a `Settings` is a function of its arguments alone, and shows no secret in its repr.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

# As in RFC 1123, with the underscore that private DNS zones use; 253 is the longest DNS name.
_HOST_NAME = re.compile(r"(?=.{1,253}$)\w([\w.-]*[\w.])?", re.ASCII)
_ENDPOINT = re.compile(r"projects/[^/\s]+/branches/[^/\s]+/endpoints/[^/\s]+")

SslMode = Literal["verify-full", "verify-ca", "require"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`, without asking DNS: other names do not."""
    if not _is_address(host):
        return host.lower() == "localhost"
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _check_host(value: str) -> str:
    if not _is_address(value) and not _HOST_NAME.fullmatch(value):
        raise ValueError("must be a host name or an address, without scheme, port or path")
    return value


def _check_address(value: str) -> str:
    if not _is_address(value):
        raise ValueError("must be an IPv4 or IPv6 address")
    return value


def _check_endpoint(value: str) -> str:
    if not _ENDPOINT.fullmatch(value):
        raise ValueError(
            "must have the form projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT"
            " (with the endpoint's id, such as primary, not its uid ep-...)"
        )
    return value


def _check_directory(value: str) -> str:
    # 107 bytes is what sockaddr_un takes on Linux; the socket's own name has up to 14.
    if not value.startswith("/") or len(value.encode()) > 92:
        raise ValueError("must be an absolute path of at most 92 bytes")
    return value


def _check_mode(value: str) -> str:
    if not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError("must be three octal digits, such as 0600 or 0660")
    return value


def _check_no_nul(value: str) -> str:
    # NUL ends a string in the StartupMessage: what follows it would become parameters.
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _or_empty(check: Callable[[str], str]) -> AfterValidator:
    """Apply `check` unless the value is empty, which means that the key is not set."""
    return AfterValidator(lambda value: value and check(value))


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch_for_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse TOML's true where a number belongs: pydantic would read it as 1."""
        name = info.field_name or ""
        if isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class ListenSettings(Section):
    """Where clients connect."""

    host: Annotated[str, AfterValidator(_check_host)] = Field(
        default="127.0.0.1",
        description="Address or host name to listen on. Whoever reaches it is logged in as the "
        "proxy's identity, so it is loopback unless allow_remote says otherwise.",
    )
    port: int = Field(
        default=5432,
        ge=0,
        le=65535,
        description="TCP port. 5432 is what every driver assumes; 0 takes a free one.",
    )
    unix_socket_directory: Annotated[str, _or_empty(_check_directory)] = Field(
        default="",
        description="Directory in which to listen as well, on the socket .s.PGSQL.PORT that "
        "drivers expect there. File permissions then decide who may connect. Empty: none.",
    )
    unix_socket_mode: Annotated[str, AfterValidator(_check_mode)] = Field(
        default="0600",
        description="Permissions of that socket, in octal. 0600: only processes of the same user.",
    )
    allow_remote: bool = Field(
        default=False,
        description="Allows a host that is not loopback. The proxy asks clients for no password: "
        "set it only where the network itself decides who may connect.",
    )
    tls_certificate: str = Field(
        default="",
        description="PEM file with the listener's certificate chain, for drivers that insist on "
        "sslmode=require. Needs tls_key. Empty: clients that ask for TLS are told no.",
    )
    tls_key: str = Field(
        default="",
        description="PEM file with the key of tls_certificate.",
    )
    max_connections: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Client connections at a time; one more is refused with 53300. Each takes two "
        "file descriptors here and a connection slot of the database, which has 104 to 3357.",
    )
    startup_timeout_seconds: float = Field(
        default=15,
        ge=0.1,
        le=600,
        description="Time a client has to send its StartupMessage, in seconds. Drivers need "
        "milliseconds; a connection that says nothing must not keep its place.",
    )

    @field_validator("tls_key")
    @classmethod
    def _key_and_certificate(cls, value: str, info: ValidationInfo) -> str:
        if bool(value) != bool(info.data.get("tls_certificate")):
            raise ValueError("must be set together with listen.tls_certificate, or neither")
        return value

    @field_validator("allow_remote")
    @classmethod
    def _remote_is_meant(cls, value: bool, info: ValidationInfo) -> bool:
        host = info.data.get("host")
        if host is not None and not value and not is_loopback(host):
            raise ValueError(
                f"must be true because listen.host {host} is not loopback: whoever reaches it is"
                " logged in without a password"
            )
        return value


class AdminSettings(Section):
    """Where health and metrics are served over HTTP. It never dials upstream."""

    enabled: bool = Field(default=True, description="Serves the admin address at all.")
    host: Annotated[str, AfterValidator(_check_host)] = Field(
        default="127.0.0.1",
        description="Address or host name to listen on. It shows no secret, but counts of use: "
        "0.0.0.0 lets a Kubernetes probe or a scraper reach it.",
    )
    port: int = Field(
        default=9090,
        ge=0,
        le=65535,
        description="TCP port; 0 takes a free one.",
    )


class WorkspaceSettings(Section):
    """The Databricks workspace. What is not set is left to the SDK's own discovery."""

    host: str = Field(
        default="",
        description="Address of the workspace, https://...; else DATABRICKS_HOST.",
    )
    client_id: str = Field(
        default="",
        description="Application id of the service principal; else DATABRICKS_CLIENT_ID.",
    )
    client_secret: SecretStr = Field(
        default=SecretStr(""),
        description="OAuth secret of the service principal; else DATABRICKS_CLIENT_SECRET. "
        "Prefer the environment to a flag, which every process of the machine can see.",
    )
    client_secret_file: str = Field(
        default="",
        description="File with that secret, in place of it. Read again at each use, so that a "
        "rotated secret needs no restart.",
    )
    token: SecretStr = Field(
        default=SecretStr(""),
        description="Personal access token, in place of a service principal; else "
        "DATABRICKS_TOKEN.",
    )
    profile: str = Field(
        default="",
        description="Profile of ~/.databrickscfg; else DATABRICKS_CONFIG_PROFILE.",
    )
    auth_type: str = Field(
        default="",
        description="Forces one of the SDK's ways to log in, such as oauth-m2m, where several "
        "would do; else DATABRICKS_AUTH_TYPE.",
    )
    config_file: str = Field(
        default="",
        description="File with the profiles; else DATABRICKS_CONFIG_FILE.",
    )
    oidc_token_filepath: str = Field(
        default="",
        description="File with an OIDC token to exchange, such as a Kubernetes projected token, "
        "with auth_type file-oidc and client_id; else DATABRICKS_OIDC_TOKEN_FILEPATH.",
    )
    oidc_token_env: str = Field(
        default="",
        description="Name of the variable with such a token, with auth_type env-oidc; else "
        "DATABRICKS_OIDC_TOKEN_ENV.",
    )
    token_audience: str = Field(
        default="",
        description="Audience to ask such tokens for, where the platform issues them (GitHub); "
        "else DATABRICKS_TOKEN_AUDIENCE.",
    )
    azure_workspace_resource_id: str = Field(
        default="",
        description="Azure resource id of the workspace; else DATABRICKS_AZURE_RESOURCE_ID.",
    )
    azure_tenant_id: str = Field(
        default="", description="Entra tenant of the service principal; else ARM_TENANT_ID."
    )
    azure_client_id: str = Field(
        default="", description="Entra application id of the principal; else ARM_CLIENT_ID."
    )
    azure_client_secret: SecretStr = Field(
        default=SecretStr(""),
        description="Entra secret of the service principal; else ARM_CLIENT_SECRET.",
    )
    google_service_account: str = Field(
        default="",
        description="Google service account to act as; else DATABRICKS_GOOGLE_SERVICE_ACCOUNT.",
    )

    @field_validator("client_secret_file")
    @classmethod
    def _one_secret(cls, value: str, info: ValidationInfo) -> str:
        secret = info.data.get("client_secret")
        if value and secret is not None and secret.get_secret_value():
            raise ValueError("must not be set together with workspace.client_secret")
        return value


class CredentialsSettings(Section):
    """The credential shown to the database."""

    token_max_age_seconds: float = Field(
        default=60,
        ge=0,
        le=3300,
        description="Age up to which a token is used for a new connection, in seconds. Connections "
        "that come together share one; 0 mints one for each. Tokens live for 3600 seconds.",
    )
    expiry_margin_seconds: float = Field(
        default=120,
        ge=0,
        le=3300,
        description="A token this close to its expiry is not used, in seconds: it must outlive a "
        "slow login, and the clocks of two machines differ.",
    )
    mint_timeout_seconds: float = Field(
        default=30,
        ge=0.1,
        le=600,
        description="Time for one token, workspace login included, in seconds. The SDK's own "
        "login request has no time limit at all.",
    )
    password_file: str = Field(
        default="",
        description="File with the password of a native Postgres role (upstream.user), used "
        "instead of tokens. Empty: tokens.",
    )


class UpstreamSettings(Section):
    """Where and as whom to dial Lakebase."""

    endpoint: Annotated[str, _or_empty(_check_endpoint)] = Field(
        default="",
        description="Resource name projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT that tokens "
        "are issued for; else ENDPOINT_NAME or LAKEBASE_ENDPOINT.",
    )
    instance: str = Field(
        default="",
        description="Name of a Provisioned instance, in place of an Autoscaling endpoint.",
    )
    read_only: bool = Field(
        default=False,
        description="Dials the read-only host of the endpoint or instance, which must have one.",
    )
    host: Annotated[str, _or_empty(_check_host)] = Field(
        default="",
        description="Host to dial, which the certificate must name; else PGHOST. Empty: looked up "
        "from the endpoint.",
    )
    hostaddr: Annotated[str, _or_empty(_check_address)] = Field(
        default="",
        description="IP address to dial in place of asking DNS for the host, as libpq has it. TLS "
        "still verifies the host. Empty: ask DNS.",
    )
    port: int = Field(default=5432, ge=1, le=65535, description="Port to dial; else PGPORT.")
    database: Annotated[str, AfterValidator(_check_no_nul)] = Field(
        default="databricks_postgres",
        min_length=1,
        description="Database of clients that name none; else PGDATABASE.",
    )
    user: Annotated[str, AfterValidator(_check_no_nul)] = Field(
        default="",
        description='Role to log in as; else PGUSER. Empty: the identity of the token. "*": the '
        "one that the client names.",
    )
    sslmode: SslMode = Field(
        default="verify-full",
        description="How far the certificate is checked. verify-ca does not compare the host name, "
        "require checks nothing: either shows the token to whoever is in between. PGSSLMODE does "
        "not change it.",
    )
    ssl_root_cert: str = Field(
        default="system",
        min_length=1,
        description='Certificate authorities to trust: "system", or a PEM file.',
    )
    connect_timeout_seconds: float = Field(
        default=60,
        ge=0.1,
        le=600,
        description="Time to reach a database that is ready for queries, in seconds, retries "
        "included. One that scaled to zero has been seen to take 30 seconds to wake.",
    )
    cancel_on_disconnect: bool = Field(
        default=True,
        description="Cancels the running query of a client that disappears, so that it does not "
        "go on using the database for nobody.",
    )

    @field_validator("instance")
    @classmethod
    def _endpoint_or_instance(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("endpoint"):
            raise ValueError("must not be set together with upstream.endpoint")
        return value


class ShutdownSettings(Section):
    """How SIGTERM and SIGINT end the proxy."""

    drain_seconds: float = Field(
        default=30,
        ge=0,
        le=86400,
        description="Time for sessions to end by themselves, in seconds; then they are cut. "
        "Kubernetes kills 30 seconds after SIGTERM unless terminationGracePeriodSeconds is longer.",
    )


class LogSettings(Section):
    """What goes to standard error. No token, password or cancel key ever does."""

    format: LogFormat = Field(
        default="auto",
        description="auto: console on a terminal, else json, one object a line.",
    )
    level: LogLevel = Field(default="info", description="The least severe level to show.")


class Settings(BaseSettings):
    """All settings, validated and frozen. Made by `load_settings`; in tests, from keywords."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        case_sensitive=True,
        hide_input_in_errors=True,
    )

    listen: ListenSettings = ListenSettings()
    admin: AdminSettings = AdminSettings()
    workspace: WorkspaceSettings = WorkspaceSettings()
    credentials: CredentialsSettings = CredentialsSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take keywords only, so that no `Settings` depends on the process's environment."""
        return (init_settings,)
