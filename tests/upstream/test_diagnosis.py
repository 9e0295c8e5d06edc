"""What an upstream's refusal means: the table of connection errors, row by row."""

import errno
import socket
import ssl
from collections.abc import Callable

import pytest

from proxy.emulator.endpoints import neon_error
from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.upstream.diagnosis import LoginAttempt, diagnose, diagnose_network
from proxy.wire.messages import ErrorResponse
from proxy.wire.secret import Secret

FAIL, RETRY, ONCE, WAIT, REMINT = (
    Disposition.FAIL,
    Disposition.RETRY,
    Disposition.RETRY_ONCE,
    Disposition.WAIT,
    Disposition.REMINT,
)
V = "verbatim"
TOKEN = "eyJ-not-a-real-token"
fatal = ErrorResponse.fatal
neon = neon_error


def shown(
    user: str = "app", database: str = "main", secret: str = TOKEN, *, password: bool = False
) -> LoginAttempt:
    return LoginAttempt(user, database, Secret(secret.encode()), password)


# The document's rows in its order: the error, class, SQLSTATE, reason, and V where it stands there.
ROWS: list[tuple[ErrorResponse, Disposition, str, str, str]] = [
    (
        neon("Provided authentication token is not a valid JWT encoding"),
        FAIL,
        "28000",
        "not_a_token",
        "",
    ),
    (
        fatal("28000", "Provided authentication token is not a valid JWT encoding"),
        FAIL,
        "28000",
        "not_a_token",
        "",
    ),
    (neon("JWT token has expired"), REMINT, "28000", "token_rejected", ""),
    *(
        (form(text), REMINT, "28000", "token_rejected", "")
        for text in (
            "OAuth: User is not authorized",
            "Invalid authorization for databricks identity login",
        )
        for form in (
            neon,
            lambda text: fatal("28P01", text),
            lambda text: fatal("28000", text),
            lambda text: ErrorResponse(((b"S", b"ERROR"), (b"C", b"28P01"), (b"M", text.encode()))),
        )
    ),
    (
        neon("native postgres login is disabled for this endpoint"),
        FAIL,
        "28000",
        "native_login_disabled",
        "",
    ),
    (neon("jwk not found"), REMINT, "28000", "token_rejected", ""),
    (neon("invalid JWT token audience"), REMINT, "28000", "token_rejected", ""),
    (
        neon("JWKs settings for this role were not configured"),
        REMINT,
        "28000",
        "token_rejected",
        "",
    ),
    (
        fatal(
            "28000",
            'The token\'s identity "a" did not match the security label configured for role "b"',
        ),
        FAIL,
        "28000",
        "identity_mismatch",
        "",
    ),
    (
        neon('The token\'s identity "a" did not match the security label configured for role "b"'),
        FAIL,
        "28000",
        "identity_mismatch",
        "",
    ),
    (
        fatal("28P01", 'password authentication failed for user "app"'),
        REMINT,
        "28P01",
        "password_rejected",
        V,
    ),
    (neon("password authentication failed for user 'app'"), REMINT, "28000", "token_rejected", ""),
    (fatal("28000", 'role "app" does not exist'), FAIL, "28000", "role_missing", V),
    (neon('role "app" does not exist'), FAIL, "28000", "role_missing", ""),
    (fatal("3D000", 'database "x" does not exist'), FAIL, "3D000", "database_missing", V),
    (neon('database "x" does not exist'), FAIL, "3D000", "database_missing", ""),
    (fatal("28000", "External authorization failed."), RETRY, "28000", "authorization_denied", ""),
    (
        fatal("28000", "External authorization failed. reason: private-link-not-supported"),
        FAIL,
        "28000",
        "network_denied",
        "",
    ),
    (
        fatal("28000", "External authorization failed: unsupported-destination-type"),
        FAIL,
        "28000",
        "network_denied",
        "",
    ),
    (
        fatal(
            "28000", "Source IP address: 192.0.2.1 is blocked by Databricks IP ACL for workspace: 1"
        ),
        FAIL,
        "28000",
        "network_denied",
        "",
    ),
    (fatal("08006", "Connection does not have SNI."), FAIL, "08001", "front_end_protocol", ""),
    (fatal("08006", "Insecure connection."), FAIL, "08001", "front_end_protocol", ""),
    (
        fatal("08P01", "Invalid protocol version. Protocol version: 196610"),
        FAIL,
        "08001",
        "front_end_protocol",
        "",
    ),
    (
        fatal("0A000", "Unsupported frontend protocol 3.2: server supports 3.0 to 3.0"),
        FAIL,
        "08001",
        "front_end_protocol",
        "",
    ),
    (
        fatal("08P01", "Received unencrypted data after SSL request."),
        FAIL,
        "08001",
        "front_end_protocol",
        "",
    ),
    (fatal("08006", "Invalid length of startup packet."), FAIL, "08001", "front_end_protocol", ""),
    (fatal("08006", "Client handshake timeout."), ONCE, "57P03", "upstream_timeout", ""),
    (neon("Authentication timed out"), ONCE, "57P03", "upstream_timeout", ""),
    (fatal("XX000", "Internal error. Try again."), RETRY, "57P03", "front_end_error", ""),
    (fatal("XX000", "Invalid upstream handshake state."), RETRY, "57P03", "front_end_error", ""),
    (
        neon("Control plane request failed: endpoint cannot be found"),
        FAIL,
        "08001",
        "endpoint_not_found",
        "",
    ),
    (
        neon("Control plane request failed: endpoint is disabled"),
        FAIL,
        "08001",
        "endpoint_disabled",
        "",
    ),
    (
        neon("Control plane request failed: endpoint is temporarily unavailable"),
        WAIT,
        "57P03",
        "upstream_starting",
        "",
    ),
    (neon("Control plane request failed"), WAIT, "57P03", "upstream_starting", ""),
    (neon("Couldn't connect to compute node"), WAIT, "57P03", "upstream_starting", ""),
    (
        neon("Failed to acquire permit to connect to the database. Too many attempts"),
        WAIT,
        "53300",
        "upstream_busy",
        "",
    ),
    (neon("Too many connections attempts"), WAIT, "53300", "upstream_busy", ""),
    (neon("Too many connections to this endpoint"), WAIT, "53300", "upstream_busy", ""),
    (
        fatal(
            "53300",
            "remaining connection slots are reserved for roles with the SUPERUSER attribute",
        ),
        FAIL,
        "53300",
        "upstream_full",
        V,
    ),
    (fatal("53300", "sorry, too many clients already"), FAIL, "53300", "upstream_full", V),
    (neon("sorry, too many clients already"), FAIL, "53300", "upstream_full", ""),
    (fatal("08P01", "SASL authentication failed"), FAIL, "28000", "pooler_needs_password", ""),
    (
        fatal("08P01", "unsupported startup parameter: search_path"),
        FAIL,
        "08P01",
        "pooler_parameter",
        V,
    ),
    # The same word as of a database that is full, and yet worth another try: clients come and go.
    (
        fatal("08P01", "no more connections allowed (max_client_conn)"),
        WAIT,
        "53300",
        "upstream_full",
        "",
    ),
    # It was "startup_refused", and final: the wait for a server connection, 2 minutes in Lakebase.
    (fatal("08P01", "query_wait_timeout"), WAIT, "53300", "upstream_full", ""),
    (neon("query_wait_timeout"), WAIT, "53300", "upstream_full", ""),
    (fatal("08P01", "client_login_timeout"), ONCE, "57P03", "upstream_timeout", ""),
    (fatal("08P01", "pgbouncer cannot connect to server"), WAIT, "57P03", "upstream_starting", ""),
    (fatal("57P03", "the database system is starting up"), WAIT, "57P03", "upstream_starting", ""),
    (
        fatal("57P03", "the database system is in recovery mode"),
        WAIT,
        "57P03",
        "upstream_starting",
        "",
    ),
    (neon("the database system is starting up"), WAIT, "57P03", "upstream_starting", ""),
    # What a front end passes on while a database restarts was 08006 upstream_error, and final.
    (neon("the database system is shutting down"), WAIT, "57P03", "upstream_starting", ""),
    (neon("the database system is in recovery mode"), WAIT, "57P03", "upstream_starting", ""),
    (
        neon("the database system is not yet accepting connections"),
        WAIT,
        "57P03",
        "upstream_starting",
        "",
    ),
    (
        neon("terminating connection due to administrator command"),
        Disposition.RECONNECT,
        "57P03",
        "upstream_lost",
        "",
    ),
    (
        neon("terminating connection because of crash of another server process"),
        Disposition.RECONNECT,
        "57P03",
        "upstream_lost",
        "",
    ),
    (neon('too many connections for role "shop"'), FAIL, "53300", "upstream_full", ""),
    (neon('too many connections for database "shop"'), FAIL, "53300", "upstream_full", ""),
    (
        fatal("57P01", "terminating connection due to administrator command"),
        Disposition.RECONNECT,
        "57P03",
        "upstream_lost",
        "",
    ),
    (
        fatal("57P02", "terminating connection because of crash of another server process"),
        Disposition.RECONNECT,
        "57P03",
        "upstream_lost",
        "",
    ),
    (
        neon("This IP address 192.0.2.1 is not allowed to connect to this endpoint."),
        FAIL,
        "28000",
        "network_denied",
        "",
    ),
    (neon("blocked network"), FAIL, "28000", "network_denied", ""),
    (
        neon("VPC endpoint ID is not specified. This endpoint requires one."),
        FAIL,
        "28000",
        "network_denied",
        "",
    ),
    (
        neon("Inconsistent project name inferred from SNI ('a') and domain ('b')."),
        FAIL,
        "08001",
        "front_end_protocol",
        "",
    ),
    (
        neon("Endpoint ID is not specified. Either upgrade the postgres client library"),
        FAIL,
        "08001",
        "front_end_protocol",
        "",
    ),
    # Below the table: an unknown text of a front end; and whatever else Postgres may say.
    (neon("something that was never seen before"), FAIL, "08006", "upstream_error", ""),
    (
        fatal("42704", 'unrecognized configuration parameter "x"'),
        FAIL,
        "42704",
        "setting_unknown",
        V,
    ),
    (fatal("42601", "-c timezone requires a value"), FAIL, "42601", "argument_invalid", V),
    (fatal("22023", "invalid value for x"), FAIL, "22023", "setting_invalid", V),
    (fatal("42501", "must be replication role"), FAIL, "42501", "privilege_missing", V),
    (fatal("28000", 'role "app" is not permitted to log in'), FAIL, "28000", "startup_refused", V),
    (fatal("53300", "too many connections for role"), FAIL, "53300", "upstream_full", V),
    # W53: no C, as in CVE-2026-6666.
    (
        ErrorResponse(((b"S", b"FATAL"), (b"M", b"nonsense"))),
        FAIL,
        "08006",
        "upstream_protocol",
        "",
    ),
    (ErrorResponse(()), FAIL, "08006", "upstream_protocol", ""),
    (
        ErrorResponse(((b"S", b"FATAL"), (b"M", b"jwk not found"))),
        REMINT,
        "28000",
        "token_rejected",
        "",
    ),
]


# PostgreSQL's own text says what to do, or nothing is known.
HINTLESS = (
    *("startup_refused", "upstream_error", "upstream_protocol"),
    *("setting_unknown", "setting_invalid", "argument_invalid", "privilege_missing"),
)


@pytest.mark.parametrize(
    ("error", "disposition", "sqlstate", "reason", "form"),
    ROWS,
    ids=[f"{row[0].severity}_{row[0].message[:40]}" for row in ROWS],
)
def test_w29_every_row_of_the_table(
    error: ErrorResponse, disposition: Disposition, sqlstate: str, reason: str, form: str
) -> None:
    found = diagnose(error, shown())
    assert (found.reason, found.kind.value.disposition) == (reason, disposition)
    answer = found.response()
    assert answer.sqlstate == sqlstate
    if form == V:
        assert answer.fields[: len(error.fields)] == error.fields
        assert [name for name, _ in answer.fields[len(error.fields) :]] in ([b"D"], [b"D", b"H"])
        assert answer.text(b"D") == f"reason={reason}"
    else:
        assert answer.severity == "FATAL"
        assert answer.text(b"D") == f"reason={reason} {error.message}".rstrip()
    if reason not in HINTLESS:
        assert answer.text(b"H")


# What the table advises, piece by piece, wherever the text and not the reason decides about it.
HINTS = [
    (neon("JWT token has expired"), ("another workspace", "clock")),
    (neon("password authentication failed for user 'x'"), ("databricks_create_role('app'",)),
    (fatal("28P01", 'password authentication failed for user "x"'), ("databricks_auth;",)),
    (fatal("28000", 'role "x" does not exist'), ("databricks_create_role('app'",)),
    (fatal("28000", "External authorization failed."), ("paused or new", "secondaries", "private")),
    (
        fatal("28000", "External authorization failed: unsupported-destination-type"),
        ("does not help",),
    ),
    (neon("blocked network"), ("IP access list", "private link")),
    (fatal("08006", "Connection does not have SNI."), ("bug", "another program", "report")),
    (neon("Inconsistent project name inferred"), ("Remove endpoint=", "options")),
    (neon("Endpoint ID is not specified"), ("Remove endpoint=", "options")),
    (neon("Control plane request failed: endpoint cannot be found"), ("deleted", "looked up")),
    (neon("Control plane request failed: endpoint is disabled"), ("Enable it",)),
    (neon("endpoint is temporarily unavailable"), ("quotas",)),
    (neon("Too many connections attempts"), ("connection storm", "pool in the application")),
    (fatal("53300", "too many clients already"), ("more CU or fewer connections",)),
    (fatal("08P01", "no more connections allowed"), ("more CU or fewer connections",)),
    (fatal("08P01", "query_wait_timeout"), ("more CU or fewer connections",)),
    (fatal("08P01", "SASL authentication failed"), ("direct host",)),
    (fatal("57P01", "terminating connection"), ("failover or a suspend",)),
]


@pytest.mark.parametrize(("error", "pieces"), HINTS, ids=[row[0].message for row in HINTS])
def test_every_row_advises_what_the_table_does(
    error: ErrorResponse, pieces: tuple[str, ...]
) -> None:
    hint = diagnose(error, shown()).response().text(b"H")
    assert all(piece in hint for piece in pieces), hint


@pytest.mark.parametrize(
    "words",
    [
        "Reason: private-link-not-supported",
        "unsupported-destination-type",
        "Source IP address: 192.0.2.7 is blocked by Databricks IP ACL for workspace: 1",
    ],
)
def test_the_ip_lists_words_count_in_detail_too(words: str) -> None:
    # It was "authorization_denied", tried again, and the address was not shown.
    found = diagnose(fatal("28000", "External authorization failed.", words), shown())
    assert found.kind is ErrorKind.NETWORK_DENIED
    assert found.response().text(b"D") == (
        f"reason=network_denied External authorization failed. {words}"
    )


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("endpoint is disabled", ErrorKind.ENDPOINT_DISABLED),
        ("endpoint cannot be found", ErrorKind.ENDPOINT_GONE),
    ],
)
@pytest.mark.parametrize("form", [neon, lambda *texts: fatal("XX000", *texts)])
def test_what_no_waiting_changes_about_an_endpoint_counts_in_detail_too(
    words: str, kind: ErrorKind, form: Callable[..., ErrorResponse]
) -> None:
    # It was "upstream_starting", and clients waited for a database that is disabled.
    error = form("Control plane request failed")
    told = ErrorResponse((*error.fields, (b"D", f"{words}.".encode())))
    found = diagnose(told, shown())
    assert found.kind is kind
    assert found.response().text(b"D").endswith(f"Control plane request failed {words}.")


def test_a_name_in_detail_does_not_decide() -> None:
    error = fatal("3D000", "no such database", 'It is called "blocked network".')
    assert diagnose(error, shown()).kind is ErrorKind.DATABASE_MISSING


def test_a_wrong_native_password_on_a_pooled_host_is_a_wrong_password() -> None:
    # It was told that the pooled host takes no OAuth token.
    found = diagnose(fatal("08P01", "SASL authentication failed"), shown(password=True))
    assert (found.reason, found.response().sqlstate) == ("password_rejected", "28P01")


def test_a_refused_token_gets_advice_on_identity_and_kind_of_role() -> None:
    # It was "upstream_error", without advice.
    client_id = "5ca1ab1e-0000-4000-8000-00000000beef"
    hint = diagnose(neon("OAuth: User is not authorized"), shown(client_id)).response().text(b"H")
    for piece in ("the identity of the token", "SERVICE_PRINCIPAL", "USER", client_id):
        assert piece in hint


def test_the_advice_for_a_full_compute_names_its_other_users() -> None:
    hint = diagnose(fatal("53300", "too many clients already"), shown()).response().text(b"H")
    assert "Feature Serving" in hint
    assert "Data API" in hint


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_texts_are_compared_without_regard_to_case(case: type[str]) -> None:
    text = case("jwt token has EXPIRED")
    assert diagnose(neon(text), shown()).kind is ErrorKind.TOKEN_REJECTED


@pytest.mark.parametrize("text", ["jwk not found", "Insecure connection.", "blocked network"])
def test_a_name_that_the_client_chose_does_not_decide(text: str) -> None:
    # A database called "jwk not found" made the proxy mint a token and blame the clock.
    error = fatal("3D000", f'database "{text}" does not exist')
    found = diagnose(error, shown())
    assert found.kind is ErrorKind.DATABASE_MISSING
    assert found.response().fields[: len(error.fields)] == error.fields


DECIDING_NAMES = ("too many connections attempts", "jwk not found", "external authorization failed")


@pytest.mark.parametrize("name", DECIDING_NAMES)
def test_a_name_in_single_quotes_does_not_decide_either(name: str) -> None:
    # The dialect of the front end: a role called so was waited for until the dial's time was up.
    found = diagnose(neon(f"password authentication failed for user '{name}'"), shown())
    assert found.kind is ErrorKind.TOKEN_REJECTED
    found = diagnose(neon(f"role '{name}' does not exist"), shown())
    assert found.kind is ErrorKind.ROLE_MISSING


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("inside", ["'", '"'])
@pytest.mark.parametrize("text", DECIDING_NAMES)
def test_a_known_name_with_quotes_of_its_own_does_not_decide(
    text: str, inside: str, quote: str
) -> None:
    name = f"a{inside}{text}{inside}b"
    long = f"{name}{'x' * 70}"
    for chosen, told in ((name, name), (long, long[:63])):
        error = fatal("3D000", f"database {quote}{told}{quote} does not exist")
        assert diagnose(error, shown(database=chosen)).kind is ErrorKind.DATABASE_MISSING
        error = fatal("28000", f"role {quote}{told}{quote} does not exist")
        assert diagnose(error, shown(chosen)).kind is ErrorKind.ROLE_MISSING


def test_the_apostrophe_of_a_word_is_no_quote() -> None:
    text = "Couldn't connect to compute node 'compute-1': it didn't answer"
    assert diagnose(neon(text), shown()).kind is ErrorKind.UPSTREAM_STARTING
    text = "The token's identity 'a' did not match the security label configured for role 'b'"
    assert diagnose(neon(text), shown()).kind is ErrorKind.IDENTITY_MISMATCH


@pytest.mark.parametrize("dialect", [neon, lambda text: fatal("28P01", text)])
def test_a_wrong_native_password_gets_no_advice_about_tokens(
    dialect: Callable[[str], ErrorResponse],
) -> None:
    # It was told to create an OAuth role for a service principal.
    error = dialect('password authentication failed for user "app"')
    found = diagnose(error, shown(password=True))
    assert (found.reason, found.response().sqlstate) == ("password_rejected", "28P01")
    assert found.kind.value.disposition is FAIL
    assert "credentials.password_file" in found.response().text(b"H")
    assert "databricks_create_role" not in found.response().text(b"H")
    missing = diagnose(fatal("28000", 'role "app" does not exist'), shown(password=True))
    assert missing.reason == "role_missing"
    assert "CREATE ROLE" in missing.response().text(b"H")


# Made when they are needed: another test looks at the repr of all that lives.
REPEATING: list[Callable[[], ErrorResponse]] = [
    lambda: neon(f"invalid token {TOKEN}"),
    lambda: neon(f"JWT token has expired: '{TOKEN}'"),
    lambda: fatal("28P01", f"no: {TOKEN}", f"D {TOKEN}", f"H {TOKEN}{TOKEN}"),
    lambda: ErrorResponse(
        ((b"S", b"FATAL"), (b"C", b"XX001"), (b"M", b"no"), (b"?", TOKEN.encode()))
    ),
]


@pytest.mark.parametrize("repeating", REPEATING)
def test_a_secret_that_the_upstream_repeats_is_not_passed_on(
    repeating: Callable[[], ErrorResponse],
) -> None:
    # Which happens: a proxy on the way that says what it did not understand.
    found = diagnose(repeating(), shown())
    assert TOKEN.encode() not in found.response().encode()
    assert b"(the credential)" in found.response().encode()
    assert TOKEN not in f"{found!r} {found} {found.detail}"


@pytest.mark.parametrize("password", ["password", "28P01", "FATAL", "a"])
def test_a_password_that_is_a_word_of_the_error_does_not_change_what_it_means(
    password: str,
) -> None:
    error = fatal("28P01", 'password authentication failed for user "app"')
    found = diagnose(error, shown(secret=password, password=True))
    assert found.kind is ErrorKind.NATIVE_PASSWORD_REJECTED
    assert found.response().sqlstate == "28P01"
    assert found.response().severity == "FATAL"


def test_the_hint_names_the_role_that_was_used() -> None:
    found = diagnose(fatal("28000", 'role "o\'hara" does not exist'), shown("o'hara"))
    assert "databricks_create_role('o''hara'" in found.response().text(b"H")


def test_a_refusal_in_another_language_is_known_by_its_sqlstate() -> None:
    found = diagnose(fatal("3D000", "Datenbank »x« existiert nicht"), shown())
    assert found.kind is ErrorKind.DATABASE_MISSING


def certificate_error() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (certificate_error(), ErrorKind.UPSTREAM_CERTIFICATE, "self-signed certificate"),
        (ssl.SSLError(1, "wrong version"), ErrorKind.UPSTREAM_TLS_FAILED, "TLS handshake failed"),
        (ssl.SSLEOFError(8, "eof"), ErrorKind.UPSTREAM_LOST, "reset"),
        (ConnectionResetError(104, "reset"), ErrorKind.UPSTREAM_LOST, "reset"),
        (BrokenPipeError(32, "broken pipe"), ErrorKind.UPSTREAM_LOST, "reset"),
        (ConnectionAbortedError(103, "aborted"), ErrorKind.UPSTREAM_LOST, "reset"),
        (TimeoutError(), ErrorKind.UPSTREAM_UNREACHABLE, "no answer"),
        (TimeoutError(110, "timed out"), ErrorKind.UPSTREAM_UNREACHABLE, "no answer"),
        (ConnectionRefusedError(111, "refused"), ErrorKind.UPSTREAM_UNREACHABLE, "refused"),
        (OSError(113, "No route to host"), ErrorKind.UPSTREAM_UNREACHABLE, "No route to host"),
        # Of two addresses, one refused and one without a route, the log said "OSError".
        (
            OSError("Multiple exceptions: [Errno 113] no route, [Errno 111] refused"),
            ErrorKind.UPSTREAM_UNREACHABLE,
            "no route",
        ),
        (socket.gaierror(-2, "unknown"), ErrorKind.UPSTREAM_UNREACHABLE, "unknown"),
    ],
)
def test_what_fails_below_postgres_is_told_apart_and_names_what_was_dialled(
    error: OSError, kind: ErrorKind, text: str
) -> None:
    found = diagnose_network(error, "db.example.com:5432")
    assert isinstance(found, ProxyError)
    assert found.kind is kind
    assert found.detail.startswith("db.example.com:5432")
    assert text in found.detail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_our_own_lack_of_resources_is_not_the_upstreams_fault(number: int) -> None:
    error = diagnose_network(OSError(number, "no more"), "host:5432")
    assert error.kind is ErrorKind.OUT_OF_RESOURCES
    assert error.response().sqlstate == "57P03"


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ("unrecognized configuration parameter 'shard_key'", "42704"),
        ("invalid value for parameter 'timezone': 'nowhere'", "22023"),
        ("invalid command-line argument for server process: -d", "42601"),
        ("permission denied to start WAL sender", "42501"),
    ],
)
def test_a_clients_own_mistake_is_not_a_lost_connection(text: str, sqlstate: str) -> None:
    # A pool tries again on 08006: a misspelt setting became a loop.
    error = ErrorResponse(((b"S", b"ERROR"), (b"C", b"XX000"), (b"M", text.encode())))
    assert diagnose(error, shown()).response().sqlstate == sqlstate
