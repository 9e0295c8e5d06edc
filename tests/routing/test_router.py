"""The route of a client: databases, aliases, keys, and every refusal (S15, S48)."""

from collections.abc import Mapping

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.routing.key_sources import DatabasePattern
from proxy.routing.keys import KeyType, Normalise, fingerprint
from proxy.routing.map_builder import map_from_tables
from proxy.routing.router import Alias, Resolution, Route, Router
from proxy.routing.shard_map import Kind, MapSpec, ShardMap
from proxy.wire.startup import V3_0, StartupMessage

USER = (b"user", b"ada@example.com")
TARGETS = ("main", "eu", "us")
ALIASES = {
    "reports": Alias("eu", "warehouse"),
    "archive": Alias("us"),
    "büro@2": Alias("us", "zweites"),
}


def built(spec: MapSpec, *rows: Mapping[str, object]) -> ShardMap:
    return map_from_tables(rows, spec, TARGETS)


NUMBERS = built(
    MapSpec(Kind.RANGE, KeyType.INT4),
    {"high": 100, "target": "eu"},
    {"low": 1000, "target": "us"},
)
NAMES = built(
    MapSpec(Kind.LIST, KeyType.TEXT, Normalise.ASCII_LOWER),
    *({"key": key, "target": "us"} for key in ("acme", "a b", "x@y", "grün.1", "k" * 100)),
)
SEVEN = fingerprint(NUMBERS.parse_key("7"))


def router(
    shard_map: ShardMap | None = NUMBERS,
    *,
    parameter: str = "shard_key",
    pattern: str | None = "{database}@{shard_key}",
    require_key: bool = True,
    forward_key: bool = False,
) -> Router:
    return Router(
        "main",
        aliases=ALIASES,
        shard_map=shard_map,
        map_name="tenants" if shard_map is not None else "",
        parameter=parameter,
        pattern=DatabasePattern.parse(pattern) if pattern else None,
        require_key=require_key,
        forward_key=forward_key,
    )


UNSHARDED = router(None)
OPTIONAL = router(require_key=False)


def startup(*pairs: tuple[bytes, bytes]) -> StartupMessage:
    return StartupMessage(V3_0, (USER, *pairs))


def named(database: bytes) -> StartupMessage:
    return startup((b"database", database))


def refusal(routing: Router, message: StartupMessage) -> ProxyError:
    with pytest.raises(ProxyError) as refused:
        routing.route(message)
    return refused.value


# Without a key: what the database's name means, with and without a shard map.


@pytest.mark.parametrize("routing", [UNSHARDED, OPTIONAL], ids=["no map", "key optional"])
@pytest.mark.parametrize(
    "message", [startup(), named(b"other"), named(b"Reports")], ids=["absent", "other", "case"]
)
def test_no_alias_is_the_default_target_and_the_message_as_it_is(
    routing: Router, message: StartupMessage
) -> None:
    assert routing.route(message) == Route("main", message)


@pytest.mark.parametrize("routing", [UNSHARDED, OPTIONAL], ids=["no map", "key optional"])
def test_w16_an_empty_database_is_the_targets_own(routing: Router) -> None:
    assert routing.route(named(b"")) == Route("main", startup())


@pytest.mark.parametrize("routing", [UNSHARDED, OPTIONAL], ids=["no map", "key optional"])
def test_w16_a_database_called_as_the_user_is_tried_before_the_targets_own(routing: Router) -> None:
    # `pg_restore -U shop -d shop` filled the target's own database although `shop` existed.
    message = named(USER[1])
    assert routing.route(message) == Route("main", message, fallback=startup())


@pytest.mark.parametrize("routing", [UNSHARDED, OPTIONAL], ids=["no map", "key optional"])
@pytest.mark.parametrize(
    ("name", "target", "database"),
    [
        (b"reports", "eu", b"warehouse"),
        (b"archive", "us", None),
        ("büro@2".encode(), "us", b"zweites"),
    ],
)
def test_an_alias_is_its_target_and_database_even_where_it_matches_the_pattern(
    routing: Router, name: bytes, target: str, database: bytes | None
) -> None:
    message = startup((b"database", name), (b"TimeZone", b"UTC"))
    opened = [(b"database", database)] if database else []
    expected = startup((b"TimeZone", b"UTC"), *opened)
    assert routing.route(message) == Route(target, expected)


def test_w45_without_a_default_target_only_aliases_lead_anywhere() -> None:
    routing = Router(None, aliases={"reports": Alias("eu")})
    assert routing.route(named(b"reports")) == Route("eu", startup())
    for message in (startup(), named(b"other")):
        error = refusal(routing, message)
        assert (error.reason, error.response().sqlstate) == ("no_target", "3D000")


def test_w16_an_alias_called_as_the_user_counts() -> None:
    # It was passed over, and the session went to another target.
    user = (b"user", b"reports")
    message = StartupMessage(V3_0, (user, (b"database", b"reports")))
    expected = StartupMessage(V3_0, (user, (b"database", b"warehouse")))
    assert UNSHARDED.route(message) == Route("eu", expected)


def test_without_a_shard_map_nothing_is_taken_out() -> None:
    message = startup((b"shard_key", b"7"), (b"options", b"-cshard_key=7"), (b"database", b"a@7"))
    assert UNSHARDED.route(message) == Route("main", message)


# With a key.


@pytest.mark.parametrize(
    "pair",
    [
        (b"shard_key", b"7"),
        (b"lakebase.shard_key", b"007"),
        (b"options", b"-c shard_key=7"),
        (b"options", b"-clakebase.shard-key=7"),
        (b"options", b"--shard-key=7"),
        (b"database", b"app@7"),
        (b"database", b"reports@7"),
        (b"database", b"@7"),
    ],
)
def test_s15_a_key_decides_wherever_it_stands(pair: tuple[bytes, bytes]) -> None:
    assert router().route(startup(pair)) == Route("eu", startup(), "tenants", SEVEN)


@pytest.mark.parametrize("database", [b"app", b"reports", b"postgres", USER[1], b"app@7"])
def test_s15_the_database_that_a_client_names_is_ignored_where_a_key_decides(
    database: bytes,
) -> None:
    message = startup((b"shard_key", b"7"), (b"database", database), (b"x", b"y"))
    assert router().route(message) == Route("eu", startup((b"x", b"y")), "tenants", SEVEN)


def test_s15_a_key_without_a_mapping_is_3d000_and_shows_only_its_fingerprint() -> None:
    error = refusal(router(), startup((b"shard_key", b"555")))
    assert error.kind is ErrorKind.MAPPING_NOT_FOUND
    shown = fingerprint(NUMBERS.parse_key("555"))
    assert error.detail == f"shard map tenants, key with fingerprint {shown}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"x", ErrorKind.KEY_SYNTAX),
        (b"2147483648", ErrorKind.KEY_RANGE),
        (b"\xff", ErrorKind.KEY_INVALID),
    ],
)
def test_s15_a_key_that_is_none_is_refused_by_its_kind(text: bytes, kind: ErrorKind) -> None:
    for pair in (
        (b"shard_key", text),
        (b"options", b"-cshard_key=" + text),
        (b"database", b"@" + text),
    ):
        assert refusal(router(), startup(pair)).kind is kind


def test_s15_a_key_that_is_too_long_is_refused() -> None:
    assert refusal(router(NAMES), named(b"@" + b"k" * 129)).kind is ErrorKind.KEY_TOO_LONG


@pytest.mark.parametrize(
    "message",
    [
        startup(),
        named(b""),
        named(USER[1]),
        named(b"app"),
        named(b"app@"),
        named(b"reports"),
        startup((b"shard_key", b"")),
        startup((b"options", b"-c shard_key= --lakebase.shard_key=")),
    ],
    ids=str,
)
def test_s15_without_a_key_a_session_is_refused_where_one_is_required(
    message: StartupMessage,
) -> None:
    assert refusal(router(), message).kind is ErrorKind.KEY_MISSING


def test_an_empty_key_is_no_key_where_none_is_required() -> None:
    message = startup((b"shard_key", b""), (b"options", b"-cshard_key= -e"))
    assert OPTIONAL.route(message) == Route("main", startup((b"options", b"-e")))
    assert OPTIONAL.route(named(b"app@")) == Route("main", named(b"app"))
    assert OPTIONAL.route(named(b"archive@")) == Route("us", startup())


def test_a_bytea_without_bytes_is_an_empty_key() -> None:
    binary = built(MapSpec(Kind.RANGE, KeyType.BYTEA), {"target": "eu"})
    assert refusal(router(binary), startup((b"shard_key", b"\\x"))).kind is ErrorKind.KEY_MISSING


# Several occurrences.


def test_s48_sources_that_agree_as_values_are_one_key() -> None:
    pairs = ((b"shard_key", b"7"), (b"options", b"--shard-key=007 -e"), (b"database", b"app@07"))
    kept = startup((b"options", b"-e"))
    assert router().route(startup(*pairs)) == Route("eu", kept, "tenants", SEVEN)


@pytest.mark.parametrize(
    ("pairs", "detail"),
    [
        (
            ((b"shard_key", b"7"), (b"options", b"-cshard_key=8")),
            "2 keys in startup parameter and options",
        ),
        (((b"options", b"-cshard_key=7 -clakebase.shard_key=8"),), "2 keys in options"),
        (
            ((b"shard_key", b"7"), (b"database", b"@8")),
            "2 keys in startup parameter and database name",
        ),
        (((b"shard_key", b"7"), (b"shard_key", b"")), "2 keys in startup parameter"),
        (
            ((b"shard_key", b"1"), (b"shard_key", b"2"), (b"database", b"@3")),
            "3 keys in startup parameter and database name",
        ),
    ],
)
def test_s48_sources_that_disagree_are_a_conflict(
    pairs: tuple[tuple[bytes, bytes], ...], detail: str
) -> None:
    for require_key in (True, False):
        error = refusal(router(require_key=require_key), startup(*pairs))
        assert error.kind is ErrorKind.KEY_CONFLICT
        assert error.detail == detail


def test_s48_every_occurrence_is_parsed() -> None:
    pairs = ((b"shard_key", b"7"), (b"options", b"-cshard_key=x"))
    assert refusal(router(), startup(*pairs)).kind is ErrorKind.KEY_SYNTAX


@pytest.mark.parametrize("key", [b"ACME", b"x@y", "grün.1".encode(), b"k" * 100])
def test_s48_names_with_dots_at_signs_unicode_and_more_than_63_bytes(key: bytes) -> None:
    for pair in ((b"database", b"app.1@" + key), (b"shard_key", key)):
        route = router(NAMES).route(startup(pair))
        assert (route.target, route.message) == ("us", startup())


def test_s48_escapes_in_options_are_worked_off_before_the_key_is_read() -> None:
    assert router(NAMES).route(startup((b"options", rb"-c shard_key=a\ b"))).target == "us"


def test_another_parameter_is_read_beside_the_proxys_own() -> None:
    routing = router(parameter="App.Tenant")
    pairs = ((b"app.tenant", b"7"), (b"options", b"-clakebase.shard_key=7"), (b"shard_key", b"9"))
    assert routing.route(startup(*pairs)).message == startup((b"shard_key", b"9"))


def test_without_a_pattern_no_database_name_has_a_key() -> None:
    assert refusal(router(pattern=None), named(b"app@7")).kind is ErrorKind.KEY_MISSING
    routing = router(pattern=None, require_key=False)
    assert routing.route(named(b"app@7")) == Route("main", named(b"app@7"))


# What is forwarded, and what logs and reprs contain.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (b"-c shard_key=A\\ B -e", rb"-e -c lakebase.shard_key=a\ b"),
        (b"-c shard_key=ACME -S", b"-c lakebase.shard_key=acme -S"),
    ],
)
def test_a_forwarded_key_is_the_canonical_text(options: bytes, expected: bytes) -> None:
    route = router(NAMES, forward_key=True).route(startup((b"options", options)))
    assert route.message.get(b"options") == expected


def test_nothing_is_forwarded_without_a_key() -> None:
    routing = router(require_key=False, forward_key=True)
    assert routing.route(named(b"app")) == Route("main", named(b"app"))


def test_no_repr_and_no_error_shows_a_key() -> None:
    with_key = startup((b"shard_key", b"ACME"))
    assert "acme" not in repr(router(NAMES, forward_key=True).route(with_key)).lower()
    for pairs in (
        ((b"shard_key", b"unknown-acme"),),
        ((b"shard_key", b"acme"), (b"database", b"@acme2")),
        ((b"shard_key", b"acme" * 99),),
    ):
        error = refusal(router(NAMES), startup(*pairs))
        assert "acme" not in f"{error!r} {error.response()}"


# resolve.


def test_a_key_resolves_to_its_bytes_bounds_and_target() -> None:
    assert router().resolve("007") == Resolution("80000007", "", "-inf", "100", "eu")
    assert router().resolve("1000") == Resolution("800003e8", "", "1000", "+inf", "us")
    assert router(NAMES).resolve("ACME") == Resolution("61636d65", "", "acme", "acme", "us")


def test_a_hashed_key_resolves_with_its_hash() -> None:
    hashed = built(MapSpec(Kind.HASH, KeyType.INT4), {"low": "0xc0000000", "target": "us"})
    expected = Resolution("80000001", "c84a4656", "0xc0000000", "+inf", "us")
    assert router(hashed).resolve("1") == expected


@pytest.mark.parametrize(
    ("routing", "text", "kind"),
    [
        (UNSHARDED, "7", ErrorKind.MAP_MISSING),
        (router(), "x", ErrorKind.KEY_SYNTAX),
        (router(), "555", ErrorKind.MAPPING_NOT_FOUND),
        (router(NAMES), "", ErrorKind.KEY_MISSING),
    ],
)
def test_what_does_not_resolve_is_refused_as_a_session_would_be(
    routing: Router, text: str, kind: ErrorKind
) -> None:
    with pytest.raises(ProxyError) as refused:
        routing.resolve(text)
    assert refused.value.kind is kind


def test_a_message_of_a_thousand_parameters_is_routed_and_not_remembered() -> None:
    # 256 of them took 66 MB.
    routed = router(None)
    small = StartupMessage(V3_0, (USER,))
    large = StartupMessage(V3_0, (USER, *((b"p%d" % number, b"") for number in range(1000))))
    assert routed.route(large).message == large
    assert routed.route(small) is routed.route(small)
    assert list(routed._routes) == [small]
