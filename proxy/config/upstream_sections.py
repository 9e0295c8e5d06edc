"""The sections about Lakebase: workspace login, credentials, and where to connect.

For: `[workspace]` and `[workspaces.NAME]`, `[credentials]`, `[upstream]` and `[targets.NAME]`.
Not for: the route of a session (`routing_sections`).

Invariant: no repr shows a secret, and the mask that `--print-config` prints is refused as a value.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator

from proxy.config.validators import (
    FileName,
    Section,
    WatchedFileName,
    check_address,
    check_endpoint,
    check_host,
    check_name,
    check_no_nul,
    check_workspace_host,
    or_empty,
)
from proxy.wire.secret import MASK

SslMode = Literal["verify-full", "verify-ca", "require"]
CancelMethod = Literal["connection_check", "cancel_request"]
PoolMode = Literal["off", "session"]

# Instead of a file: the authorities that the operating system trusts.
SYSTEM_AUTHORITIES: Final = "system"


class WorkspaceSettings(Section):
    """The Databricks workspace. The SDK's own discovery provides what is not set."""

    host: Annotated[str, or_empty(check_workspace_host)] = Field(
        default="",
        description="Address of the workspace, https://...; else DATABRICKS_HOST. http:// is "
        "allowed for this machine only, because the client secret is sent there.",
    )
    client_id: str = Field(
        default="",
        description="Application id of the service principal; else DATABRICKS_CLIENT_ID.",
    )
    client_secret: SecretStr = Field(
        default=SecretStr(""),
        description="OAuth secret of the service principal; else DATABRICKS_CLIENT_SECRET. Prefer "
        "the environment to a flag, which every process on the machine can see.",
    )
    client_secret_file: WatchedFileName = Field(
        default="",
        description="File with that secret, instead of client_secret. It is read at each use, so "
        "a rotated secret needs no restart.",
    )
    token: SecretStr = Field(
        default=SecretStr(""),
        description="Personal access token, instead of a service principal; else DATABRICKS_TOKEN.",
    )
    profile: str = Field(
        default="",
        description="Profile of ~/.databrickscfg; else DATABRICKS_CONFIG_PROFILE.",
    )
    auth_type: str = Field(
        default="",
        description="Selects one of the SDK's authentication types, such as oauth-m2m, if several "
        "are possible; else DATABRICKS_AUTH_TYPE.",
    )
    config_file: FileName = Field(
        default="",
        description="File with the profiles; else DATABRICKS_CONFIG_FILE.",
    )
    oidc_token_filepath: FileName = Field(
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
        description="Audience to request for such tokens, if the platform issues them (GitHub); "
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
        default="", description="Entra application id of the service principal; else ARM_CLIENT_ID."
    )
    azure_client_secret: SecretStr = Field(
        default=SecretStr(""),
        description="Entra secret of the service principal; else ARM_CLIENT_SECRET.",
    )
    google_service_account: str = Field(
        default="",
        description="Google service account to impersonate; else "
        "DATABRICKS_GOOGLE_SERVICE_ACCOUNT.",
    )

    ssl_root_cert: WatchedFileName = Field(
        default="",
        description="PEM file with the certificate authorities to trust for the workspace. Empty: "
        "those of REQUESTS_CA_BUNDLE, else of CURL_CA_BUNDLE, else of SSL_CERT_FILE, else the "
        "SDK's own. [workspaces.NAME] without one use that of [workspace].",
    )

    @field_validator("client_secret", "token", "azure_client_secret")
    @classmethod
    def _no_mask(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value() == MASK:
            raise ValueError("must be the secret itself, not the mask that --print-config shows")
        return value

    @field_validator("client_secret_file")
    @classmethod
    def _one_secret(cls, value: str, info: ValidationInfo) -> str:
        secret = info.data.get("client_secret")
        if value and secret is not None and secret.get_secret_value():
            raise ValueError("must not be set together with client_secret")
        return value


class CredentialsSettings(Section):
    """The credential that is sent to the database."""

    token_max_age_seconds: float = Field(
        default=60,
        ge=0,
        le=3300,
        description="Maximum age of a token that is used for a new connection, in seconds. "
        "Connections that arrive together share a token; 0 mints one for each. Tokens are valid "
        "for 3600 seconds.",
    )
    expiry_margin_seconds: float = Field(
        default=120,
        ge=0,
        le=3300,
        description="A token is not used in this time before its expiry, in seconds: it must "
        "outlast a slow login, and two clocks differ.",
    )
    mint_timeout_seconds: float = Field(
        default=30,
        ge=0.1,
        le=600,
        description="Time limit for getting a token, including the workspace login, in seconds. "
        "The SDK's own login request has no time limit.",
    )
    password_file: WatchedFileName = Field(
        default="",
        description="File with the password of a native Postgres role (upstream.user), used "
        "instead of tokens. Empty: tokens.",
    )


# Where to connect is one decision, in up to four keys that are inherited together or not at all. If
# each were inherited alone, PGHOST or [upstream] would send every target to the same host.
ADDRESS_KEYS: Final = ("endpoint", "instance", "host", "hostaddr")


def not_inherited(upstream: Mapping[str, object], own: Mapping[str, object]) -> tuple[str, ...]:
    """Return the keys that a target does not inherit from `[upstream]`, whether set or not.

    These are all of `ADDRESS_KEYS` if the target sets one of them or names another workspace: an
    endpoint belongs to one workspace, and a host must not receive a token of another. In the latter
    case `user` too, because a role is an identity of one workspace.
    """
    workspace = own.get("workspace")
    if workspace is not None and workspace != (upstream.get("workspace") or ""):
        return (*ADDRESS_KEYS, "user")
    return ADDRESS_KEYS if any(own.get(key) for key in ADDRESS_KEYS) else ()


def with_inherited(upstream: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """Return the values of a target: its own, and those that it inherits from `[upstream]`."""
    return {**upstream, **dict.fromkeys(not_inherited(upstream, own), ""), **own}


class UpstreamSettings(Section):
    """Where to connect to Lakebase, and as which role."""

    endpoint: Annotated[str, or_empty(check_endpoint)] = Field(
        default="",
        description="Resource name projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT of the "
        "endpoint that tokens are issued for; else ENDPOINT_NAME or LAKEBASE_ENDPOINT.",
    )
    instance: str = Field(
        default="",
        description="Name of a Provisioned instance, instead of an Autoscaling endpoint.",
    )
    read_only: bool = Field(
        default=False,
        description="Connects to the read-only host of the endpoint or instance, which must have "
        "one. That host is looked up, so host must not be set.",
    )
    pooled: bool = Field(
        default=False,
        description="Connects to the endpoint's pooled host (with read_only the read-only one): "
        "transaction mode, without LISTEN, session SET, temporary tables, SQL PREPARE, session "
        "advisory locks and pg_dump. That host is looked up, so host must not be set.",
    )
    host: Annotated[str, or_empty(check_host)] = Field(
        default="",
        description="Host to connect to, which the certificate must name; else PGHOST. Empty: "
        "looked up from the endpoint.",
    )
    hostaddr: Annotated[str, or_empty(check_address)] = Field(
        default="",
        description="IP address to connect to instead of resolving the host, as in libpq. TLS "
        "still verifies the host. Empty: use DNS.",
    )
    port: int = Field(default=5432, ge=1, le=65535, description="Port to connect to; else PGPORT.")
    database: Annotated[str, AfterValidator(check_no_nul)] = Field(
        default="databricks_postgres",
        min_length=1,
        description="Database for clients that name none; else PGDATABASE.",
    )
    user: Annotated[str, AfterValidator(check_no_nul)] = Field(
        default="",
        description='Role to log in as; else PGUSER. Empty: the identity of the token. "*": the '
        "user that the client names.",
    )
    sslmode: SslMode = Field(
        default="verify-full",
        description="How the certificate is verified. verify-ca does not compare the host name, "
        "and require verifies nothing: either lets someone in the network path read the token. "
        "PGSSLMODE does not change it.",
    )
    ssl_root_cert: WatchedFileName = Field(
        default=SYSTEM_AUTHORITIES,
        min_length=1,
        description='Certificate authorities to trust: "system", or a PEM file.',
    )
    connect_timeout_seconds: float = Field(
        default=60,
        ge=0.1,
        le=600,
        description="Time limit for a database that is ready for queries, including retries, in "
        "seconds. A database that was scaled to zero has been seen to take 30 seconds to resume.",
    )
    connect_retry_seconds: float = Field(
        default=30,
        ge=0,
        le=600,
        description="Time for which a connection that is refused or reset before the session "
        "exists is tried again, in seconds, within connect_timeout_seconds. A change of a "
        "compute's limits or a restart takes some 20 seconds.",
    )
    connects_max: int = Field(
        default=50,
        ge=1,
        le=10_000,
        description="Sessions that are opened at a time, for each target; the others wait within "
        "connect_timeout_seconds. Limits concurrent TLS handshakes when many clients reconnect "
        "together.",
    )
    workspace: Annotated[str, or_empty(check_name)] = Field(
        default="",
        description="NAME of the [workspaces.NAME] that the endpoint belongs to and that tokens "
        "come from. Empty: [workspace].",
    )
    cancel_on_disconnect: bool = Field(
        default=True,
        description="Ends the running query of a client that disconnects, so that it does not "
        "continue to use the database.",
    )
    cancel_method: CancelMethod = Field(
        default="connection_check",
        description="How cancel_on_disconnect does it. connection_check: sets "
        "client_connection_check_interval (PostgreSQL 14), unless the client sets it. The database "
        "ends the query, but never a COMMIT that waits for replicas. cancel_request: for older "
        "servers, and front ends that keep their own connection open. It also ends that wait, so "
        "that rows become visible which no replica has.",
    )
    pool: PoolMode = Field(
        default="off",
        description="Keeps upstream sessions for the next clients. off: one client connection is "
        "one upstream session. session: it is reset, and goes to the next client that connects "
        "with the same settings.",
    )
    pool_idle_max: int = Field(
        default=10,
        ge=0,
        le=10_000,
        description="Idle sessions that are kept for each target. Each is a slot of the database, "
        "and takes some megabytes there.",
    )
    pool_size_max: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Sessions of a pool at a time for each target, idle ones included. The next "
        "client waits. 0: no limit.",
    )
    pool_spare_min: int = Field(
        default=1,
        ge=0,
        le=100,
        description="Idle sessions with the same settings that are opened ahead, after a client "
        "took one. Without clients nothing is opened, so that a database can scale to zero.",
    )
    pool_lifetime_seconds: float = Field(
        default=2700,
        ge=1,
        le=86_400,
        description="Age from which on no further client gets a session, in seconds, up to a tenth "
        "less at random. It takes so long until a dropped role, or a setting that ALTER ROLE "
        "changed, has effect.",
    )
    pool_idle_seconds: float = Field(
        default=900,
        ge=1,
        le=86_400,
        description="Time without a client after which a session is closed, in seconds, up to a "
        "tenth less at random.",
    )
    pool_wait_seconds: float = Field(
        default=30,
        ge=0,
        le=600,
        description="Time limit for the wait for a session when pool_size_max is reached, in "
        "seconds, within connect_timeout_seconds; then the client is refused with 53300.",
    )
    pool_check_seconds: float = Field(
        default=30,
        ge=0,
        le=3600,
        description="A session that was idle for longer is checked before a client gets it, in "
        "seconds. 0: always.",
    )
    accelerated: bool = Field(
        default=True,
        description="Uses the compiled relay if it was built (see lakebase-auth-proxy version "
        "--build). false: the relay in pure Python, which behaves the same and needs more CPU, to "
        "rule out the compiled code as a cause.",
    )

    @field_validator("instance")
    @classmethod
    def _endpoint_or_instance(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("endpoint"):
            raise ValueError("must not be set together with endpoint")
        return value

    @field_validator("pool", mode="before")
    @classmethod
    def _transaction_is_planned(cls, value: object) -> object:
        if value == "transaction":
            raise ValueError("must be off or session, as pools by transaction are not built yet")
        return value

    def given(self) -> dict[str, object]:
        """Return the keys that were set, including empty ones, with their values."""
        return {name: value for name, value in self if name in self.model_fields_set}

    def inheriting(self, upstream: "UpstreamSettings") -> "UpstreamSettings":
        """Return these values with those that are inherited from `[upstream]`."""
        return upstream.model_copy(update=with_inherited(dict(upstream), self.given()))
