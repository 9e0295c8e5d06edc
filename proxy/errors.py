"""Every reason for which the proxy refuses a session: one closed list, one exception.

An `ErrorKind` is a row of a table: a stable reason word, the SQLSTATE, what the dialer may do about
it, a sentence for the client, and a hint for the person who reads it. The words are a contract
(metrics, alerts and tests use them); the sentences are not. Kinds that an operator counts as one
share a word and its SQLSTATE, and differ in what the dialer does or the hint advises. Two words
have several SQLSTATEs: `key_invalid`, and `out_of_resources`.

Outside the code that raises it a failure is a `ProxyError` or a `CancelledError`, nothing else.
Texts name parameters, hosts and roles, never a token, a password or a cancel key.

Sources: the tables of REST errors and of connection errors in the Lakebase facts; SQLSTATEs as in
PostgreSQL's appendix "Error Codes".
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from proxy.wire.messages import ErrorResponse

_CREATE_ROLE_HINT: Final = (
    "Does the role exist on this branch? CREATE EXTENSION IF NOT EXISTS databricks_auth; "
    "SELECT databricks_create_role('{user}', '{identity}');"
)
_NETWORK_HINT: Final = (
    "Check the workspace's IP access list and the private link; retrying does not help."
)
_RETRY_HINT: Final = "Try again in a few seconds."
_FULL_HINT: Final = (
    "Use more CU or fewer connections. Others use slots of the same compute: Feature Serving, "
    "the Data API, and clients that do not come through this proxy."
)
_KEY_HINT: Final = (
    "Give a value of the shard map's key_type, as PostgreSQL writes it, of 128 bytes at most."
)

# The role of a service principal has the name of its client id.
_CLIENT_ID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class Disposition(Enum):
    """What the dialer may do before it reports the error to the client."""

    FAIL = "report it to the client"
    RETRY = "retry a few times, with back-off"
    RETRY_ONCE = "retry once"
    RECONNECT = "retry for connect_retry_seconds, with back-off"
    WAIT = "retry with a longer back-off, within connect_timeout_seconds"
    REMINT = "if the token came from the cache, mint a new one and retry once"


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One row of the table.

    `hint` may contain `{user}`, the role that was used, and `{identity}`, which is Databricks' word
    for the kind of that role.
    """

    reason: str
    sqlstate: str
    message: str
    hint: str = ""
    disposition: Disposition = Disposition.FAIL


class ErrorKind(Enum):
    """The closed list, grouped by where the error occurs."""

    # The workspace: its login and its credential API.
    WORKSPACE_LOGIN_FAILED = ErrorRow(
        "workspace_login_failed",
        "28000",
        "the Databricks workspace refused the login",
        "Are client id and secret right and not expired? Is it the right workspace host?",
    )
    LOGIN_PROGRAM_FAILED = ErrorRow(
        "workspace_login_failed",
        "28000",
        "the program that logs in to the Databricks workspace failed",
        "Log in with it again (databricks auth login, az login); DETAIL has its own words.",
    )
    WORKSPACE_ACCESS_MISSING = ErrorRow(
        "workspace_access_missing",
        "28000",
        "the identity may not use this Databricks workspace",
        "Give the service principal the Workspace access entitlement.",
    )
    IP_BLOCKED = ErrorRow(
        "ip_blocked",
        "28000",
        "the Databricks workspace does not allow this IP address",
        "Check the IP access list; a new token will not help.",
    )
    WORKSPACE_NETWORK_DENIED = ErrorRow(
        "ip_blocked",
        "28000",
        "the Databricks workspace does not allow this network",
        "Is there a private link for the workspace's services (service-direct endpoint)? "
        "Check the workspace's ingress policy; a new token will not help.",
    )
    PAT_SCOPE = ErrorRow(
        "pat_scope",
        "28000",
        "the personal access token lacks the scopes for database credentials",
        "Use OAuth (a service principal) instead of a personal access token.",
    )
    PERMISSION_DENIED = ErrorRow(
        "permission_denied",
        "28000",
        "the identity may not create credentials for this endpoint",
        "May the identity use this Lakebase project?",
    )
    ENDPOINT_INVALID = ErrorRow(
        "endpoint_invalid",
        "08001",
        "the endpoint's resource name is not valid",
        "The form is projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT.",
    )
    ENDPOINT_NOT_FOUND = ErrorRow(
        "endpoint_not_found",
        "08001",
        "the endpoint does not exist",
        "Is it the endpoint's id (such as primary), not its uid (ep-...)? Was it deleted? "
        "Is workspace.host the workspace that it belongs to?",
    )
    INSTANCE_INVALID = ErrorRow(
        "endpoint_invalid",
        "08001",
        "the database instance's name is not valid",
        "upstream.instance is the name of a Provisioned instance. An Autoscaling endpoint belongs "
        "in upstream.endpoint.",
    )
    INSTANCE_NOT_FOUND = ErrorRow(
        "endpoint_not_found",
        "08001",
        "the database instance does not exist",
        "Is upstream.instance the instance's name? Was it deleted, or upgraded to an Autoscaling "
        "project (upstream.endpoint)? Is workspace.host the workspace that it belongs to?",
    )
    API_BUSY = ErrorRow(
        "api_busy",
        "57P03",
        "the Databricks API is under maintenance",
        _RETRY_HINT,
        Disposition.RETRY,
    )
    API_THROTTLED = ErrorRow(
        "api_throttled",
        "57P03",
        "the Databricks API limits the rate of credentials",
        "Raise credentials.token_max_age_seconds.",
        Disposition.RETRY,
    )
    API_UNREACHABLE = ErrorRow(
        "api_unreachable",
        "57P03",
        "the Databricks workspace cannot be reached",
        "Is workspace.host right and reachable from here? Are HTTPS_PROXY and NO_PROXY right? "
        "Behind an intercepting proxy, name its CA in REQUESTS_CA_BUNDLE.",
        Disposition.RETRY,
    )
    API_ERROR = ErrorRow(
        "api_error",
        "57P03",
        "the Databricks API fails",
        "It is a failure of the Databricks API, not of this machine. Minting continues to be "
        "tried; check the status page of Databricks.",
        Disposition.RETRY,
    )
    API_REPLY_INVALID = ErrorRow(
        "api_unreachable",
        "57P03",
        "the Databricks API's reply is not valid",
        "Is workspace.host a Databricks workspace? Does another server answer in its place?",
        Disposition.RETRY,
    )
    WORKSPACE_CERTIFICATE = ErrorRow(
        "workspace_certificate",
        "08001",
        "the Databricks workspace's certificate does not verify",
        "Is there an intercepting proxy? Name its CA in workspace.ssl_root_cert (or "
        "REQUESTS_CA_BUNDLE).",
    )
    CREDENTIAL_INVALID = ErrorRow(
        "credential_invalid",
        "57P03",
        "the Databricks API returned a credential that is not usable",
        "Check this machine's clock.",
        Disposition.RETRY,
    )
    CLOCK_OFF = ErrorRow(
        "workspace_configuration",
        "28000",
        "this machine's clock differs from the workspace's",
        "Set this machine's clock: a token's expiry is in the workspace's time.",
    )
    CONFIGURATION_INVALID = ErrorRow(
        "workspace_configuration",
        "28000",
        "the Databricks SDK found no usable credentials",
        "Set DATABRICKS_HOST, DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET.",
    )
    CONFIGURATION_MISTAKE = ErrorRow(
        "workspace_configuration",
        "28000",
        "a setting for the Databricks workspace cannot be used",
        "Correct the setting, the variable or the file that DETAIL names.",
    )
    TWO_LOGINS = ErrorRow(
        "workspace_configuration",
        "28000",
        "more than one kind of login is set for the Databricks workspace",
        "Unset one of them, or set DATABRICKS_AUTH_TYPE (workspace.auth_type) to the one to use.",
    )
    SIGN_IN_PAGE = ErrorRow(
        "workspace_configuration",
        "28000",
        "the Databricks workspace's address answers with a web page, not with its API",
        "Is workspace.host (DATABRICKS_HOST) the workspace's own address? Is there a proxy that "
        "wants a sign-in?",
    )
    NOT_A_WORKSPACE = ErrorRow(
        "workspace_configuration",
        "28000",
        "the server at the workspace's address is no Databricks workspace",
        "Is workspace.host (DATABRICKS_HOST) the workspace's own address? Was it deleted?",
    )

    # The upstream: the connection was not established.
    UPSTREAM_DNS = ErrorRow(
        "upstream_dns",
        "57P03",
        "the upstream's host name cannot be resolved",
        "Is the host the one that the API names? Does the resolver work?",
        Disposition.RETRY,
    )
    UPSTREAM_UNREACHABLE = ErrorRow(
        "upstream_unreachable",
        "57P03",
        "the upstream cannot be reached",
        "Check firewall, IP access list and port 5432.",
        Disposition.RECONNECT,
    )
    UPSTREAM_CERTIFICATE = ErrorRow(
        "upstream_certificate",
        "08001",
        "the upstream's certificate does not verify",
        "Is there an intercepting proxy? Name its CA in upstream.ssl_root_cert.",
    )
    UPSTREAM_NO_TLS = ErrorRow(
        "upstream_no_tls",
        "08001",
        "the upstream does not speak TLS",
        "This is not a Lakebase host; the proxy never continues in plaintext.",
    )
    FRONT_END_PROTOCOL = ErrorRow(
        "front_end_protocol",
        "08001",
        "the upstream's front end did not accept the connection",
        "A bug in the proxy, or another program answers in place of Lakebase; please report it.",
    )
    ENDPOINT_OPTION = ErrorRow(
        "front_end_protocol",
        "08001",
        "the upstream's front end did not accept the connection",
        "Remove endpoint= and project= from the client's options.",
    )
    ENDPOINT_GONE = ErrorRow(
        "endpoint_not_found",
        "08001",
        "the endpoint no longer exists",
        "Was it deleted? Its host is looked up again with the next connection.",
    )
    ENDPOINT_DISABLED = ErrorRow(
        "endpoint_disabled", "08001", "the endpoint is disabled", "Enable it in the project."
    )

    # The upstream: connected, then lost, silent or in error before ReadyForQuery.
    UPSTREAM_TIMEOUT = ErrorRow(
        "upstream_timeout",
        "57P03",
        "the upstream did not answer in time",
        _RETRY_HINT,
        Disposition.RETRY_ONCE,
    )
    LOGIN_TIMEOUT = ErrorRow(
        "upstream_timeout",
        "57P03",
        "the upstream did not finish the login in time",
        "Did the database just wake? " + _RETRY_HINT,
        Disposition.WAIT,  # a login to a database that wakes can hang where the next one succeeds
    )
    UPSTREAM_LOST = ErrorRow(
        "upstream_lost",
        "57P03",
        "the upstream closed the connection before it was ready",
        "Possibly a failover or a suspend. " + _RETRY_HINT,
        Disposition.RECONNECT,
    )
    UPSTREAM_TLS_FAILED = ErrorRow(
        "upstream_lost",
        "57P03",
        "the TLS handshake with the upstream failed",
        "Is something in between that intercepts or filters TLS? " + _RETRY_HINT,
        Disposition.RETRY,
    )
    FRONT_END_ERROR = ErrorRow(
        "front_end_error",
        "57P03",
        "the upstream's front end failed",
        _RETRY_HINT,
        Disposition.RETRY,
    )
    UPSTREAM_PROTOCOL = ErrorRow(
        "upstream_protocol", "08006", "the upstream violated the protocol before it was ready"
    )
    UPSTREAM_ERROR = ErrorRow(
        "upstream_error", "08006", "the upstream's front end refused the connection"
    )
    UPSTREAM_STARTING = ErrorRow(
        "upstream_starting",
        "57P03",
        "the database is starting",
        _RETRY_HINT + " If this continues: are the project's quotas used up?",
        Disposition.WAIT,
    )
    UPSTREAM_BUSY = ErrorRow(
        "upstream_busy",
        "53300",
        "the upstream accepts no more connections at the moment",
        "A connection storm: use a pool in the application.",
        Disposition.WAIT,
    )
    UPSTREAM_FULL = ErrorRow(
        "upstream_full",
        "53300",
        "the database has no free connection slot",
        _FULL_HINT,
    )
    POOLER_FULL = ErrorRow(
        "upstream_full",
        "53300",
        "the pooled host has no free connection slot",
        _FULL_HINT,
        Disposition.WAIT,  # other clients disconnect after a while
    )

    # The upstream: the login was refused.
    NOT_A_TOKEN = ErrorRow(
        "not_a_token",
        "28000",
        "the upstream requires an OAuth token and received something else",
        "A personal access token or a password was used; an OAuth role needs a minted credential.",
    )
    TOKEN_REJECTED = ErrorRow(
        "token_rejected",
        "28000",
        "the upstream rejected the token",
        "A token of another workspace? Is this machine's clock right? " + _CREATE_ROLE_HINT,
        Disposition.REMINT,
    )
    ROLE_KIND_REJECTED = ErrorRow(
        "token_rejected",
        "28000",
        "the upstream did not accept the token for this role",
        "Is upstream.user the identity of the token, and the role of its kind (SERVICE_PRINCIPAL "
        "for a client id, USER for an e-mail)? " + _CREATE_ROLE_HINT,
        Disposition.REMINT,
    )
    PASSWORD_REJECTED = ErrorRow(
        "password_rejected",
        "28P01",
        "the upstream rejected the password or token",
        _CREATE_ROLE_HINT,
        Disposition.REMINT,
    )
    NATIVE_PASSWORD_REJECTED = ErrorRow(
        "password_rejected",
        "28P01",
        "the upstream rejected the native role's password",
        "Does credentials.password_file contain the password of upstream.user? Does the role "
        "exist on this branch, and does the project allow native passwords?",
    )
    NATIVE_LOGIN_DISABLED = ErrorRow(
        "native_login_disabled",
        "28000",
        "the endpoint does not allow native roles to log in",
        "Enable native passwords (enable_pg_native_login) in the project or instance, or log in "
        "with a token: remove credentials.password_file.",
    )
    IDENTITY_MISMATCH = ErrorRow(
        "identity_mismatch",
        "28000",
        "the token's identity does not match the role",
        "upstream.user must be the client id, the e-mail, or a group that the identity belongs to.",
    )
    ROLE_MISSING = ErrorRow("role_missing", "28000", "the role does not exist", _CREATE_ROLE_HINT)
    NATIVE_ROLE_MISSING = ErrorRow(
        "role_missing",
        "28000",
        "the native role does not exist",
        "Create it on this branch with CREATE ROLE ... LOGIN PASSWORD, or correct upstream.user.",
    )
    DATABASE_MISSING = ErrorRow(
        "database_missing",
        "3D000",
        "the database does not exist",
        "Lakebase's default database is databricks_postgres.",
    )
    AUTHORIZATION_DENIED = ErrorRow(
        "authorization_denied",
        "28000",
        "the upstream's front end did not authorize the connection",
        "Is the endpoint paused or new, or are readable secondaries off? "
        "Check the IP access list and the private link.",
        Disposition.RETRY,
    )
    NETWORK_DENIED = ErrorRow(
        "network_denied",
        "28000",
        "the upstream does not accept connections from this network",
        _NETWORK_HINT,
    )
    POOLER_NEEDS_PASSWORD = ErrorRow(
        "pooler_needs_password",
        "28000",
        "the pooled host accepts no OAuth token",
        "Use the direct host (without -pooler), or a native role with credentials.password_file.",
    )
    POOLER_PARAMETER = ErrorRow(
        "pooler_parameter",
        "08P01",
        "the pooled host does not accept a startup parameter",
        "Remove the setting or use the direct host: it accepts client_encoding, "
        "DateStyle, TimeZone, standard_conforming_strings, application_name and IntervalStyle.",
    )
    UNSUPPORTED_AUTH = ErrorRow(
        "unsupported_auth",
        "28000",
        "the upstream asks for an authentication method that is not supported",
        "OAuth roles log in with a token, native roles with SCRAM-SHA-256.",
    )
    # PostgreSQL's errors for a client's own mistake. A front end relays them without the SQLSTATE,
    # and a client's pool that took one for a lost connection would retry forever.
    SETTING_UNKNOWN = ErrorRow(
        "setting_unknown", "42704", "a setting of the session is unknown to the database"
    )
    SETTING_INVALID = ErrorRow(
        "setting_invalid", "22023", "a setting of the session has an invalid value"
    )
    ARGUMENT_INVALID = ErrorRow(
        "argument_invalid", "42601", "the options of the session are not valid"
    )
    PRIVILEGE_MISSING = ErrorRow(
        "privilege_missing", "42501", "the role may not open such a session"
    )
    STARTUP_REFUSED = ErrorRow("startup_refused", "XX000", "the database refused the session")

    # The shard key that the client sends, and its route. An invalid key is one reason with three
    # SQLSTATEs, as PostgreSQL has them for a value: syntax, range, anything else.
    KEY_MISSING = ErrorRow(
        "key_missing",
        "22023",
        "no shard key was given",
        "Give it in options (-c shard_key=KEY), as a startup parameter, or in the database name.",
    )
    KEY_CONFLICT = ErrorRow(
        "key_conflict",
        "22023",
        "the shard key was given more than once, with different values",
        "Give it in one place, or the same key in each place.",
    )
    KEY_TOO_LONG = ErrorRow("key_too_long", "22023", "the shard key is too long", _KEY_HINT)
    KEY_SYNTAX = ErrorRow(
        "key_invalid", "22P02", "the shard key is not written as a value of its type", _KEY_HINT
    )
    KEY_RANGE = ErrorRow(
        "key_invalid", "22003", "the shard key is out of its type's range", _KEY_HINT
    )
    KEY_INVALID = ErrorRow("key_invalid", "22023", "the shard key is not valid", _KEY_HINT)
    MAPPING_NOT_FOUND = ErrorRow(
        "mapping_not_found",
        "3D000",
        "no shard has this shard key",
        "Is it the right key? Which mapping should cover it? Try lakebase-auth-proxy resolve KEY.",
    )
    NO_TARGET = ErrorRow(
        "no_target",
        "3D000",
        "no target is configured for this database",
        "Connect to one of the names in [databases], or set upstream.endpoint for all others.",
    )
    MAP_MISSING = ErrorRow(
        "map_missing",
        "3D000",
        "no shard map is configured",
        "Set routing.shard_map, and the map in shard_maps.",
    )

    # The shard map in the catalogue, and the shards' own part of it.
    CATALOGUE_UNREACHABLE = ErrorRow(
        "catalogue_unreachable",
        "08001",
        "the shard map's catalogue cannot be reached",
        "Is the database of catalogue.target up? Keys that are known already are still served. "
        + _RETRY_HINT,
    )
    CATALOGUE_REFUSED = ErrorRow(
        "catalogue_unreachable",
        "08001",
        "the shard map's catalogue cannot be read",
        "Has the database of catalogue.target the schema (lakebase-auth-proxy shards init), and "
        "may the proxy's role read it (lakebase-auth-proxy shards grant reader ROLE)?",
    )
    CATALOGUE_STALE = ErrorRow(
        "catalogue_stale",
        "08001",
        "the shard map is too old to be used without validation",
        "The catalogue has not been reached for catalogue.max_stale_seconds: is the database of "
        "catalogue.target up?",
    )
    CATALOGUE_MAP_MISSING = ErrorRow(
        "map_missing",
        "3D000",
        "the catalogue has no such shard map",
        "Is routing.shard_map its name? Create it with lakebase-auth-proxy shards create.",
    )
    MAP_MISMATCH = ErrorRow(
        "map_mismatch",
        "55000",
        "the catalogue's shard map is not as it is configured",
        "Correct kind, key_type and normalise in the map's [shard_maps.NAME], or remove them.",
    )
    MAPPING_OFFLINE = ErrorRow(
        "mapping_offline", "57P03", "the shard key's mapping is offline", _RETRY_HINT
    )
    MAPPING_STALE = ErrorRow(
        "mapping_stale", "57P03", "the shard key's mapping is being changed", _RETRY_HINT
    )
    MAPPING_MOVED = ErrorRow(
        "mapping_moved",
        "57P01",
        "terminating connection because the shard key's mapping moved or went offline",
        "Connect again.",
    )
    SHARD_HOST_REFUSED = ErrorRow(
        "shard_host_refused",
        "55000",
        "the shard has a host that this proxy sends no tokens to",
        "If it is right, add it to catalogue.shard_hosts. If not: who can write the catalogue?",
    )
    WORKSPACE_UNKNOWN = ErrorRow(
        "workspace_unknown",
        "55000",
        "the shard is in a workspace that this proxy does not configure",
        "Add its [workspaces.NAME] to the configuration, or correct the shard.",
    )
    SHARD_ROW_INVALID = ErrorRow(
        "shard_not_valid",
        "55000",
        "the catalogue's rows of the shard are not valid",
        "Correct them with lakebase-auth-proxy shards. All other shards are served.",
    )
    SHARD_NOT_VALID = ErrorRow(
        "shard_not_valid",
        "55000",
        "the database is not set up as a shard",
        "Add it with lakebase-auth-proxy shards add-shard.",
    )
    WRONG_SHARD = ErrorRow(
        "wrong_shard",
        "55000",
        "the database is another shard than the catalogue says",
        "Is it a branch or a copy of the shard? It is not written to until that is known.",
    )
    SHARD_BEHIND = ErrorRow(
        "shard_behind",
        "55000",
        "the database knows an older state of the shard than the catalogue",
        "Was it restored to an earlier time? It is not written to until that is known.",
    )
    STORE_VERSION = ErrorRow(
        "store_version",
        "55000",
        "the shard map's schema has another major version than this proxy",
        "Upgrade what the DETAIL names: the proxy, or the schema with lakebase-auth-proxy shards "
        "upgrade.",
    )
    VALIDATE_DENIED = ErrorRow(
        "validate_denied",
        "55000",
        "the role may not validate sessions in the shard",
        "Run lakebase-auth-proxy shards grant session ROLE.",
    )
    UNREGISTERED = ErrorRow(
        "unregistered",
        "55000",
        "the shard could not register the session",
        "The owner of the shard's schema must see the sessions' start: pg_read_all_stats, or "
        "membership in the role that logs in.",
    )

    # The pool of a target.
    POOL_FULL = ErrorRow(
        "pool_full",
        "53300",
        "all sessions of the target's pool are in use",
        "Raise upstream.pool_size_max, or use fewer or shorter connections.",
    )
    POOL_MODE_INVALID = ErrorRow(
        "pool_mode_invalid",
        "22023",
        "the value of lakebase.pool is not valid",
        "Give one of the modes in DETAIL, in one place. A client can ask for less than "
        "upstream.pool of its target, not for more.",
    )

    # The proxy itself.
    TOO_MANY_CONNECTIONS = ErrorRow(
        "too_many_connections",
        "53300",
        "too many clients already",
        "Raise listen.max_connections, or use a pool in the application.",
    )
    TOO_MANY_STARTING = ErrorRow(
        "too_many_starting",
        "53300",
        "too many clients already",
        "Connect again in a moment. Look for clients that connect and send nothing.",
    )
    SHUTTING_DOWN = ErrorRow(
        "shutting_down",
        "57P01",
        "terminating connection due to administrator command",
        "The proxy is being stopped or replaced. Connect again.",
    )
    ENDED_BY_OPERATOR = ErrorRow(
        "ended_by_operator",
        "57P01",
        "terminating connection due to administrator command",
        "An operator of the proxy has ended this session. Connect again.",
    )
    IDLE_TIMEOUT = ErrorRow(
        "idle_timeout",
        "57P05",
        "terminating connection due to idle-session timeout",
        "Connect again when there is work, or raise listen.idle_timeout_seconds.",
    )
    PASSWORD_FILE_UNREADABLE = ErrorRow(
        "password_file_unreadable",
        "28000",
        "the native role's password cannot be read",
        "Check credentials.password_file and its permissions.",
    )
    # A bound that the proxy has counted itself, as PostgreSQL's class 53 is; what only failed may
    # succeed soon, or at the next host.
    TOO_FEW_FILES = ErrorRow(
        "out_of_resources",
        "53000",
        "the proxy's limit of open files allows no more connections",
        "Raise the proxy's limit of open files: a session takes two.",
    )
    OUT_OF_RESOURCES = ErrorRow(
        "out_of_resources",
        "57P03",
        "the proxy has run out of file descriptors, threads or memory",
        "Raise the limit that DETAIL names. " + _RETRY_HINT,
    )
    INTERNAL = ErrorRow(
        "internal_error", "XX000", "internal error in the proxy", "See the proxy's log."
    )


# Refusals that need no action of the operator: a client's own mistake, or a drain. They are logged
# at level info, all others at warning.
NOT_THE_OPERATORS: Final = frozenset(
    {
        ErrorKind.ENDPOINT_OPTION,
        ErrorKind.DATABASE_MISSING,
        ErrorKind.SETTING_UNKNOWN,
        ErrorKind.SETTING_INVALID,
        ErrorKind.ARGUMENT_INVALID,
        ErrorKind.POOLER_PARAMETER,
        ErrorKind.PRIVILEGE_MISSING,
        ErrorKind.STARTUP_REFUSED,
        ErrorKind.KEY_MISSING,
        ErrorKind.KEY_CONFLICT,
        ErrorKind.KEY_TOO_LONG,
        ErrorKind.KEY_SYNTAX,
        ErrorKind.KEY_RANGE,
        ErrorKind.KEY_INVALID,
        ErrorKind.MAPPING_NOT_FOUND,
        ErrorKind.POOL_MODE_INVALID,
        ErrorKind.MAPPING_OFFLINE,
        ErrorKind.MAPPING_MOVED,
        ErrorKind.SHUTTING_DOWN,
        ErrorKind.ENDED_BY_OPERATOR,
        ErrorKind.IDLE_TIMEOUT,
    }
)


class ProxyError(Exception):
    """A session that cannot be served, with everything that the client and the log report of it.

    `detail` is the original text, if there is one. `original` is an error from the upstream
    PostgreSQL itself: the client receives it with all of its fields, and with a detail and a hint
    where it has none. `retry_after_seconds` is how long the other side asks to wait before a retry,
    0 if it does not say. `final` means that the dialer does not retry, whatever the kind allows.
    """

    def __init__(
        self,
        kind: ErrorKind,
        detail: str = "",
        *,
        user: str = "",
        original: ErrorResponse | None = None,
        retry_after_seconds: float = 0.0,
        final: bool = False,
    ) -> None:
        super().__init__(f"{kind.value.reason}: {detail or kind.value.message}")
        self.kind = kind
        self.detail = detail
        self.original = original
        self.retry_after_seconds = retry_after_seconds
        self.final = final
        # The role's name is inside a literal of the statement that the hint offers.
        literal = user.replace("'", "''")
        self._hint = kind.value.hint.format(user=literal, identity=identity_kind(user))

    @property
    def reason(self) -> str:
        """The stable word in the DETAIL, the log and the metrics."""
        return self.kind.value.reason

    def response(self) -> ErrorResponse:
        """Return the ErrorResponse for the client."""
        row = self.kind.value
        if self.original is not None:
            return _completed(self.original, f"reason={row.reason}", self._hint)
        detail = f"reason={row.reason} {self.detail}".rstrip()
        return ErrorResponse.fatal(row.sqlstate, row.message, detail, self._hint)


def _completed(error: ErrorResponse, detail: str, hint: str) -> ErrorResponse:
    """Return PostgreSQL's error with this detail and hint where it has none itself."""
    ours = ((b"D", detail.encode()), (b"H", hint.encode()))
    return ErrorResponse(
        (*error.fields, *((name, text) for name, text in ours if text and not error.text(name)))
    )


def identity_kind(role: str) -> str:
    """Return the kind of identity that a role's name looks like."""
    if _CLIENT_ID.fullmatch(role):
        return "SERVICE_PRINCIPAL"
    return "USER" if "@" in role else "GROUP"
