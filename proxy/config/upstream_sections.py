"""The sections about Lakebase: as whom the workspace is asked, what is shown, where is dialled.

For: `[workspace]` and `[workspaces.NAME]`, `[credentials]`, `[upstream]` and `[targets.NAME]`.
Not for: which target a session goes to (`routes`).

Invariant: no secret is in a repr, and the mask that `--print-config` prints never becomes one.
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

# In place of a file: the authorities that the operating system trusts.
SYSTEM_AUTHORITIES: Final = "system"


class WorkspaceSettings(Section):
    """The Databricks workspace. What is not set is left to the SDK's own discovery."""

    host: Annotated[str, or_empty(check_workspace_host)] = Field(
        default="",
        description="Address of the workspace, https://...; else DATABRICKS_HOST. http:// is for "
        "this machine alone: the client secret goes there.",
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
    client_secret_file: WatchedFileName = Field(
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
    password_file: WatchedFileName = Field(
        default="",
        description="File with the password of a native Postgres role (upstream.user), used "
        "instead of tokens. Empty: tokens.",
    )


# Where to dial is one answer in up to four keys, taken from one place: were they completed key by
# key, PGHOST or [upstream] would send every target to one host.
ADDRESS_KEYS: Final = ("endpoint", "instance", "host", "hostaddr")


def not_inherited(upstream: Mapping[str, object], own: Mapping[str, object]) -> tuple[str, ...]:
    """Return the keys that a target does not take from `[upstream]`, set or not.

    All of `ADDRESS_KEYS`, if it says where to dial: by one of them, or by another workspace, for an
    endpoint is one workspace's, and a host must not be shown the token of another. A role is one
    workspace's identity as well.
    """
    workspace = own.get("workspace")
    if workspace is not None and workspace != (upstream.get("workspace") or ""):
        return (*ADDRESS_KEYS, "user")
    return ADDRESS_KEYS if any(own.get(key) for key in ADDRESS_KEYS) else ()


def with_inherited(upstream: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """Return a target's values: its own, and those of `[upstream]` for what it does not set."""
    return {**upstream, **dict.fromkeys(not_inherited(upstream, own), ""), **own}


class UpstreamSettings(Section):
    """Where and as whom to dial Lakebase."""

    endpoint: Annotated[str, or_empty(check_endpoint)] = Field(
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
        description="Dials the read-only host of the endpoint or instance, which must have one. "
        "It is looked up, so that host must not be set.",
    )
    host: Annotated[str, or_empty(check_host)] = Field(
        default="",
        description="Host to dial, which the certificate must name; else PGHOST. Empty: looked up "
        "from the endpoint.",
    )
    hostaddr: Annotated[str, or_empty(check_address)] = Field(
        default="",
        description="IP address to dial in place of asking DNS for the host, as libpq has it. TLS "
        "still verifies the host. Empty: ask DNS.",
    )
    port: int = Field(default=5432, ge=1, le=65535, description="Port to dial; else PGPORT.")
    database: Annotated[str, AfterValidator(check_no_nul)] = Field(
        default="databricks_postgres",
        min_length=1,
        description="Database of clients that name none; else PGDATABASE.",
    )
    user: Annotated[str, AfterValidator(check_no_nul)] = Field(
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
    ssl_root_cert: WatchedFileName = Field(
        default=SYSTEM_AUTHORITIES,
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
    connects_max: int = Field(
        default=50,
        ge=1,
        le=10_000,
        description="Sessions being opened at a time, for each target; the others wait within "
        "connect_timeout_seconds. A thousand clients that come back together shall not be a "
        "thousand TLS handshakes at once.",
    )
    workspace: Annotated[str, or_empty(check_name)] = Field(
        default="",
        description="NAME of the [workspaces.NAME] that the endpoint is in and that tokens come "
        "from. Empty: [workspace].",
    )
    cancel_on_disconnect: bool = Field(
        default=True,
        description="Cancels the running query of a client that disappears, so that it does not "
        "go on using the database for nobody.",
    )
    accelerated: bool = Field(
        default=True,
        description="Relays by compiled code where it was built (lakebase-auth-proxy version "
        "--build). false: pure Python, which does the same and takes more CPU, for when the "
        "compiled code is in doubt.",
    )

    @field_validator("instance")
    @classmethod
    def _endpoint_or_instance(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("endpoint"):
            raise ValueError("must not be set together with endpoint")
        return value

    def given(self) -> dict[str, object]:
        """Return the keys that were set, empty ones included, with their values."""
        return {name: value for name, value in self if name in self.model_fields_set}

    def inheriting(self, upstream: "UpstreamSettings") -> "UpstreamSettings":
        """Return these values, completed by those of `[upstream]` as `with_inherited` does."""
        return upstream.model_copy(update=with_inherited(dict(upstream), self.given()))
