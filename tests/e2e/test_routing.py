"""A session is where its shard key says, whichever driver gives it and in whichever place.

The shards are real servers; each tells its name in `shard_identity`. What a key means, and every
corner of finding it, is tested without a network in `tests/routing`.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import asyncpg
import psycopg
import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import V3_0
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, startup
from tests.support.running import (
    USER,
    LogLines,
    asyncpg_arguments,
    eventually,
    first_lines,
    libpq,
    proxy_settings,
)
from tests.support.sharding import (
    list_map,
    shard_by_asyncpg,
    shard_by_psycopg,
    sharded,
    target,
    targets,
)

FORWARDED = "SELECT current_setting('lakebase.shard_key', true)"
SHARDS = pytest.mark.parametrize(("key", "shard"), [("7", "one"), ("1500", "two")])


async def refused(proxy: App, **parameters: str) -> ErrorResponse:
    """Send these startup parameters and return the answer."""
    async with plain_client(proxy) as client:
        await client.send(startup(V3_0, **parameters))
        error = await client.error()
        assert await client.receive_rest() == b""
        return error


def nothing_was_dialled(lakebase: Lakebase) -> bool:
    return lakebase.gateway.accepted == 0 and lakebase.workspace.mints == []


# -- where the key is ----------------------------------------------------------------------------


@SHARDS
@pytest.mark.parametrize(
    "given",
    [
        {"options": "-c shard_key={key}"},
        {"options": "-cshard_key={key}"},
        {"options": "--shard-key={key}"},
        {"options": "--SHARD_KEY={key}"},
        {"options": "-c lakebase.shard_key={key}"},
        {"options": "--lakebase.shard-key={key}"},
        {"options": "-c work_mem=5MB -c shard_key=0{key} -c search_path=public"},
        {"options": "-c shard_key=\\0{key}"},  # a backslash escapes any byte
        {"dbname": "app@{key}"},
        {"dbname": "databricks_postgres@{key}"},
        {"dbname": "@{key}"},
        {"dbname": "app@0{key}", "options": "-c shard_key={key}"},
    ],
    ids=str,
)
async def test_s15_s48_psycopg_reaches_the_shard_of_its_key(
    start_proxy: StartProxy, lakebase: Lakebase, given: dict[str, str], key: str, shard: str
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    written = {name: text.format(key=key) for name, text in given.items()}
    assert await shard_by_psycopg(proxy, **written) == shard
    (record,) = lakebase.gateway.sessions
    assert record.sni == lakebase[shard].endpoint.host


@SHARDS
@pytest.mark.parametrize("name", ["shard_key", "lakebase.shard_key", "Shard_Key"])
async def test_s15_asyncpg_reaches_the_shard_of_its_server_settings(
    start_proxy: StartProxy, lakebase: Lakebase, name: str, key: str, shard: str
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    assert await shard_by_asyncpg(proxy, server_settings={name: key}) == shard
    assert await shard_by_asyncpg(proxy, database=f"app@{key}") == shard
    both: dict[str, Any] = {"database": f"x@{key}", "server_settings": {name: f"00{key}"}}
    assert await shard_by_asyncpg(proxy, **both) == shard


async def test_a_parameter_and_a_pattern_of_ones_own_are_read(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    pattern = "{database}/tenant/{shard_key}"
    proxy = await start_proxy(**sharded(lakebase, parameter="tenant", database_pattern=pattern))
    assert await shard_by_psycopg(proxy, options="-c tenant=1500") == "two"
    assert await shard_by_psycopg(proxy, dbname="app/tenant/1500") == "two"
    assert await shard_by_asyncpg(proxy, server_settings={"lakebase.shard_key": "7"}) == "one"
    error = await refused(proxy, database="app@7")
    assert error.text(b"D") == "reason=key_missing"


@SHARDS
async def test_s15_a_provisioned_instance_is_reached_by_the_same_key(
    start_proxy: StartProxy, lakebase: Lakebase, key: str, shard: str
) -> None:
    two = target(lakebase, lakebase["two"].instance)
    sections = sharded(lakebase)
    sections["targets"] = {**targets(lakebase), "two": two}
    proxy = await start_proxy(**sections)
    assert await shard_by_psycopg(proxy, options=f"-c shard_key={key}") == shard
    expected = lakebase["one"].endpoint if shard == "one" else lakebase["two"].instance
    assert [record.sni for record in lakebase.gateway.sessions] == [expected.host]


# -- what else the client asked for --------------------------------------------------------------


async def test_s15_the_database_that_a_client_names_beside_a_key_is_a_label(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    sql = "SELECT current_database()"
    for given in ({"dbname": "nowhere@7"}, {"dbname": "nowhere", "options": "-c shard_key=7"}):
        assert await shard_by_psycopg(proxy, sql, **given) == "databricks_postgres"
    settings = {"shard_key": "7", "host": "elsewhere.example", "hostaddr": "192.0.2.1"}
    # Names that are none of the protocol's: PostgreSQL takes them for settings that it lacks.
    with pytest.raises(asyncpg.PostgresError) as caught:
        await shard_by_asyncpg(proxy, server_settings=settings)
    assert "host" in str(caught.value)
    assert {record.sni for record in lakebase.gateway.records} == {lakebase["one"].endpoint.host}


async def test_w20_s48_the_key_is_taken_out_and_everything_else_in_options_holds(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    options = (
        r"-c work_mem=5MB --shard-key=7 --search-path=a,\ b -cstatement_timeout=1234"
        r" -c lakebase.shard_key=7 -c application_name=x\ \\y -c my.own=1 -c shard_key=07"
    )
    expected = {
        "work_mem": "5MB",
        "search_path": "a, b",
        "statement_timeout": "1234ms",
        "application_name": r"x \y",
        "my.own": "1",
    }
    connect = psycopg.AsyncConnection.connect
    async with await connect(**libpq(proxy, options=options)) as connection:
        for name, value in expected.items():
            shown = await (await connection.execute(f"SHOW {name}".encode())).fetchone()
            assert shown == (value,), name
        lost = await (await connection.execute(FORWARDED.encode())).fetchone()
        assert lost == (None,)
    (record,) = lakebase.gateway.sessions
    assert b"shard" not in b" ".join(value for pair in record.parameters for value in pair)


@pytest.mark.parametrize("given", [{"dbname": "x@007"}, {"options": "-c shard_key=007"}], ids=str)
async def test_a_forwarded_key_is_a_setting_and_survives_discard_all(
    start_proxy: StartProxy, lakebase: Lakebase, given: dict[str, str]
) -> None:
    proxy = await start_proxy(**sharded(lakebase, forward_key=True))
    connect = psycopg.AsyncConnection.connect
    async with await connect(**libpq(proxy, **given), autocommit=True) as connection:
        shown = []
        for sql in (FORWARDED, "SET lakebase.shard_key = 8", FORWARDED, "DISCARD ALL", FORWARDED):
            cursor = await connection.execute(sql.encode())
            shown += await cursor.fetchall() if cursor.description else []
    # The client may change it: no security boundary, as the documents say.
    assert shown == [("7",), ("8",), ("7",)]


async def test_a_key_is_forwarded_only_where_it_is_wanted_and_there(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    assert await shard_by_psycopg(proxy, FORWARDED, options="-c lakebase.shard_key=7") is None
    other = await start_proxy(**sharded(lakebase, forward_key=True, require_key=False))
    assert await shard_by_psycopg(other, FORWARDED) is None
    assert await shard_by_psycopg(other, FORWARDED, dbname="x@1500") == "1500"


# -- refusals ------------------------------------------------------------------------------------

BAD: Mapping[str, tuple[dict[str, str], str, str]] = {
    "missing": ({}, "22023", "key_missing"),
    "empty": ({"shard_key": ""}, "22023", "key_missing"),
    "empty in the name": ({"database": "app@"}, "22023", "key_missing"),
    "two that differ": ({"shard_key": "7", "database": "app@8"}, "22023", "key_conflict"),
    "empty and another": ({"shard_key": "", "database": "app@8"}, "22023", "key_conflict"),
    "by both names": ({"shard_key": "7", "lakebase.shard_key": "8"}, "22023", "key_conflict"),
    "twice in options": ({"options": "-cshard_key=7 -cshard_key=8"}, "22023", "key_conflict"),
    "malformed": ({"shard_key": "seven"}, "22P02", "key_invalid"),
    "malformed beside a good one": (
        {"shard_key": "7", "database": "app@seven"},
        "22P02",
        "key_invalid",
    ),
    "out of range": ({"database": f"app@{1 << 63}"}, "22003", "key_invalid"),
    "uncovered": ({"options": "-c shard_key=2000"}, "3D000", "mapping_not_found"),
    "below all": ({"shard_key": "-1"}, "3D000", "mapping_not_found"),
}


@pytest.mark.parametrize("case", list(BAD))
async def test_s15_s48_a_bad_key_is_refused_before_any_dial_and_counted(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, case: str
) -> None:
    parameters, sqlstate, reason = BAD[case]
    proxy = await start_proxy(**sharded(lakebase))
    error = await refused(proxy, **parameters)
    assert (error.text(b"S"), error.sqlstate) == ("FATAL", sqlstate)
    assert (error.text(b"D") or "").split()[0] == f"reason={reason}"
    assert nothing_was_dialled(lakebase)
    await eventually(lambda: log.events("session refused"), "its line")
    (line,) = log.events("session refused")
    assert (line["level"], line["sqlstate"], line["reason"]) == ("info", sqlstate, reason)
    assert proxy.metrics.value("startup_failures_total", reason=reason) == 1


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({}, asyncpg.InvalidParameterValueError, "no shard key was given"),
        (
            {"database": "a@7", "server_settings": {"shard_key": "8"}},
            asyncpg.InvalidParameterValueError,
            "more than once",
        ),
        ({"database": "a@x"}, asyncpg.InvalidTextRepresentationError, "not written as a value"),
        (
            {"server_settings": {"shard_key": "9" * 19}},
            asyncpg.NumericValueOutOfRangeError,
            "out of its type's range",
        ),
        ({"database": "a@5000"}, asyncpg.InvalidCatalogNameError, "no shard has this shard key"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_s15_a_driver_raises_what_its_language_has_for_a_bad_key(
    start_proxy: StartProxy,
    lakebase: Lakebase,
    given: dict[str, Any],
    kind: type[asyncpg.PostgresError],
    words: str,
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    with pytest.raises(kind, match=words) as caught:
        await asyncpg.connect(**asyncpg_arguments(proxy, **given))
    assert caught.value.detail.startswith("reason=")
    assert caught.value.hint
    key = given.get("server_settings", {}).get("shard_key")
    options = f"-c shard_key={key}" if key else ""
    dbname = given.get("database", "databricks_postgres")
    with pytest.raises(psycopg.OperationalError, match=words) as seen:
        await psycopg.AsyncConnection.connect(**libpq(proxy, dbname=dbname, options=options))
    assert f"DETAIL:  {caught.value.detail.split()[0]}" in str(seen.value)
    assert f"HINT:  {caught.value.hint}" in str(seen.value)


async def test_s48_a_key_that_is_too_long_and_one_that_is_no_utf8_are_refused(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase, list_map({"a": "one"})))
    error = await refused(proxy, database="app@" + "k" * 129)
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("22023", "reason=key_too_long")
    async with plain_client(proxy) as client:
        await client.send(startup(V3_0, shard_key="kk").replace(b"kk", b"\xff\xfe"))
        error = await client.error()
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("22023", "reason=key_invalid")
    assert nothing_was_dialled(lakebase)


# -- without a key -------------------------------------------------------------------------------


async def test_without_a_key_the_plain_target_serves_where_none_is_required(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    upstream = {"endpoint": lakebase["two"].endpoint.name}
    proxy = await start_proxy(upstream=upstream, **sharded(lakebase, require_key=False))
    assert await shard_by_psycopg(proxy) == "two"
    assert await shard_by_psycopg(proxy, options="-c shard_key=7") == "one"
    assert await shard_by_psycopg(proxy, "SELECT current_database()", dbname="postgres") == (
        "postgres"
    )
    assert (await refused(proxy, shard_key="2000")).sqlstate == "3D000"


async def test_w45_an_alias_is_a_database_of_a_target(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    databases: dict[str, object] = {
        "orders": "two",
        "reports": {"target": "two", "database": "postgres"},
        "a@b.c-ünï": "two",
        "x" * 63: "two",
    }
    proxy = await start_proxy(targets=targets(lakebase), databases=databases)
    where = "SELECT current_database()"
    assert await shard_by_psycopg(proxy, dbname="orders") == "two"
    assert await shard_by_psycopg(proxy, where, dbname="orders") == "databricks_postgres"
    assert await shard_by_psycopg(proxy, where, dbname="reports") == "postgres"
    assert await shard_by_psycopg(proxy, dbname="a@b.c-ünï") == "two"
    assert await shard_by_asyncpg(proxy, database="x" * 63) == "two"
    assert await shard_by_psycopg(proxy) == "one"  # no alias: the plain target
    error = await refused(proxy, database="orders@7")  # without a shard map @ is no separator
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("3D000", "reason=database_missing")


async def test_an_alias_beside_a_shard_map_serves_who_gives_no_key_and_beats_the_pattern(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    databases: dict[str, object] = {"orders": "two", "app@7": "two"}
    proxy = await start_proxy(databases=databases, **sharded(lakebase, require_key=False))
    assert await shard_by_psycopg(proxy, dbname="orders") == "two"
    assert await shard_by_psycopg(proxy, dbname="app@7") == "two"
    assert await shard_by_psycopg(proxy, dbname="other@7") == "one"
    assert await shard_by_psycopg(proxy, dbname="orders", options="-c shard_key=7") == "one"


async def test_w16_an_alias_called_as_the_user_counts(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    # The alias was passed over because libpq sends the user's name for "no database given": the
    # session was on another shard.
    proxy = await start_proxy(targets=targets(lakebase), databases={USER: "two"})
    assert await shard_by_psycopg(proxy, dbname=USER) == "two"
    assert await shard_by_psycopg(proxy, dbname=USER, user="somebody") == "two"


@pytest.fixture
def shop(lakebase: Lakebase) -> Iterator[str]:
    """Return the name of a database of the first shard, besides its own."""
    cluster = lakebase.shards[0].cluster
    cluster.execute("CREATE DATABASE shop")
    yield "shop"
    cluster.execute("DROP DATABASE shop WITH (FORCE)")


async def test_w16_a_database_called_as_the_user_is_opened_if_it_exists(
    proxy: App, shop: str
) -> None:
    # `pg_restore -U shop -d shop` filled the configured database.
    where = "SELECT current_database()"
    assert await shard_by_psycopg(proxy, where, dbname=shop, user=shop) == shop
    assert await shard_by_asyncpg(proxy, where, database=shop, user=shop) == shop


async def test_w16_only_a_missing_database_leads_to_the_configured_one(
    proxy: App, lakebase: Lakebase, shop: str
) -> None:
    # One that exists and may not be opened is refused, also the next time.
    lakebase.shards[0].cluster.execute("REVOKE CONNECT ON DATABASE shop FROM PUBLIC")
    for _ in range(2):
        error = await refused(proxy, user=shop, database=shop)
        assert error.sqlstate == "42501"
    # Another user's name is a database as any other.
    error = await refused(proxy, database="somebody")
    assert error.sqlstate == "3D000"


@pytest.mark.parametrize("user", ["ada@example.com", "app@1500", "1500"])
async def test_w16_a_missing_database_is_no_key_even_where_the_user_looks_like_one(
    start_proxy: StartProxy, lakebase: Lakebase, user: str
) -> None:
    # libpq sends the user's name as the database; asyncpg and JDBC do the same.
    proxy = await start_proxy(**sharded(lakebase))
    for given in ({}, {"database": user}, {"database": ""}):
        error = await refused(proxy, user=user, **given)
        assert error.text(b"D") == "reason=key_missing"
    keyless = await start_proxy(**sharded(lakebase, require_key=False))
    where = libpq(keyless, user=user)
    del where["dbname"]
    async with await psycopg.AsyncConnection.connect(**where) as connection:
        row = await (await connection.execute("SELECT current_database()")).fetchone()
    assert row == ("databricks_postgres",)


async def test_w45_without_a_plain_target_an_unknown_name_leads_nowhere(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    nowhere = {"endpoint": "", "hostaddr": ""}
    proxy = await start_proxy(
        upstream=nowhere, targets=targets(lakebase), databases={"orders": "two"}
    )
    error = await refused(proxy, database="elsewhere")
    assert (error.sqlstate, error.text(b"D")) == ("3D000", "reason=no_target")
    assert "[databases]" in (error.text(b"H") or "")
    assert nothing_was_dialled(lakebase)
    assert proxy.metrics.value("startup_failures_total", reason="no_target") == 1
    assert await shard_by_psycopg(proxy, dbname="orders") == "two"


# -- names and secrets ---------------------------------------------------------------------------

STRANGE = {
    "eu.west": "one",
    "ada@example.com": "two",
    "größe-日本-🐘": "one",
    "with space": "two",
    r"back\slash": "one",
    'it\'s "quoted"': "two",
    "x" * 64: "one",
    "y" * 128: "two",
    "é" * 64: "one",
}


@pytest.mark.parametrize("key", list(STRANGE), ids=lambda key: key[:16])
async def test_s48_names_with_dots_at_signs_unicode_and_many_bytes_are_keys(
    start_proxy: StartProxy, lakebase: Lakebase, key: str
) -> None:
    proxy = await start_proxy(**sharded(lakebase, list_map(STRANGE), forward_key=True))
    escaped = key.replace("\\", "\\\\").replace(" ", "\\ ")
    ways: list[Any] = [
        shard_by_psycopg(proxy, dbname=f"app@{key}"),
        shard_by_psycopg(proxy, options=f"-c shard_key={escaped}"),
        shard_by_psycopg(proxy, options=f"-c shard_key={escaped}", dbname=f"@{key}"),
        shard_by_asyncpg(proxy, server_settings={"lakebase.shard_key": key}),
        shard_by_asyncpg(proxy, database=f"a.b@{key}"),
    ]
    assert [await way for way in ways] == [STRANGE[key]] * len(ways)
    assert await shard_by_psycopg(proxy, FORWARDED, dbname=f"@{key}") == key


async def test_a_read_only_target_is_reached_by_its_own_host(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    two = lakebase["two"].endpoint
    sections = sharded(lakebase)
    sections["targets"] = {
        "one": target(lakebase, lakebase["one"].endpoint),
        "two": target(lakebase, two, read_only=True),
    }
    proxy = await start_proxy(**sections)
    error = await refused(proxy, shard_key="1500")
    assert (error.sqlstate, error.text(b"D").split()[0]) == ("28000", "reason=authorization_denied")
    two.readable_secondaries = True
    assert await shard_by_psycopg(proxy, options="-c shard_key=1500") == "two"
    assert lakebase.gateway.sessions[-1].sni == two.hosts["read_only_host"]
    assert await shard_by_psycopg(proxy, options="-c shard_key=7") == "one"


async def test_a_key_is_in_no_log_line_no_error_and_no_metric(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    key, uncovered = "tenant-of-great-renown", "tenant-of-no-renown"
    shard_map = list_map({key: "one"})
    proxy = await start_proxy(
        admin={"enabled": True, "port": 0}, **sharded(lakebase, shard_map, forward_key=True)
    )
    assert await shard_by_psycopg(proxy, dbname=f"app@{key}") == "one"
    assert await shard_by_psycopg(proxy, options=f"-c shard_key={key}") == "one"
    lakebase["one"].endpoint.disabled = True
    answers = [await refused(proxy, shard_key=key)]
    answers.append(await refused(proxy, database=f"app@{uncovered}"))
    answers.append(await refused(proxy, database=f"app@{key}", shard_key=uncovered))
    answers.append(await refused(proxy, shard_key=uncovered * 10))
    await eventually(lambda: len(log.events("session refused")) == len(answers), "all lines")
    await eventually(lambda: len(log.events("session ended")) == 2, "all ends")
    shown = [
        log.getvalue(),
        proxy.metrics.exposition().decode(),
        repr(proxy.snapshot.router),
    ]
    shown += [answer.encode().decode("latin-1") for answer in answers]
    for text in shown:
        assert "renown" not in text
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:8]
    for lines in (first_lines(log), log.events("session ended")):
        assert [line["shard_key"] for line in lines] == [fingerprint] * 2
    failed = log.events("session refused")[0]
    assert (failed["target"], failed["shard_key"]) == ("one", fingerprint)
    assert hashlib.sha256(uncovered.encode()).hexdigest()[:8] in answers[1].text(b"D")


@pytest.mark.parametrize("options", ["shard_key=renown", "-c work_mem=renown"])
async def test_s15_a_misplaced_key_is_quoted_to_its_client_and_to_no_log(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines, options: str
) -> None:
    """A forgotten -c makes an argument of it, which PostgreSQL quotes."""
    proxy = await start_proxy(**sharded(lakebase, require_key=False))
    error = await refused(proxy, user=USER, options=options)
    assert "renown" in error.text(b"D")
    assert "shard=" not in error.text(b"D"), "no map chose this one"
    assert log.events("session refused")
    assert "renown" not in log.getvalue()


async def test_s15_an_error_after_a_key_names_the_shard(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    lakebase["two"].endpoint.disabled = True
    error = await refused(proxy, user=USER, database="app@1500")
    assert re.fullmatch(r"reason=\w+ .+ shard=two", error.text(b"D") or "")
    error = await refused(proxy, user=USER, database="app@7", options="-c nonsense=1")
    assert re.fullmatch(r"reason=\w+ .+ shard=one", error.text(b"D") or "")
    assert "shard=" not in (await refused(proxy, user=USER, database="app@2500")).text(b"D")


async def test_sessions_are_counted_by_the_target_that_their_key_led_to(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    for key, times in (("7", 2), ("1500", 3)):
        for _ in range(times):
            await shard_by_psycopg(proxy, dbname=f"app@{key}")
    started = {
        name: proxy.metrics.value("sessions_started_total", target=name) for name in ("one", "two")
    }
    assert started == {"one": 2, "two": 3}


async def test_what_a_shard_map_says_is_counted_without_any_key(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    value = proxy.metrics.value
    assert value("shard_map_mappings", map="tenants") == 2
    for key in ("7", "8", "1500"):
        await shard_by_psycopg(proxy, dbname=f"app@{key}")
    await refused(proxy, user=USER, database="app@2500")
    await refused(proxy, user=USER)
    routed = [value("route_total", shard=name, result="routed") for name in ("one", "two")]
    assert routed == [2, 1]
    assert value("route_total", map="tenants", result="refused") == 2
    found = [value("lookup_total", map="tenants", result=result) for result in ("hit", "miss")]
    assert found == [3, 1]
    proxy.reload(proxy_settings(lakebase))
    assert "tenants" not in proxy.metrics.exposition().decode()


async def test_a_cancel_request_goes_to_the_shard_of_its_session(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    connect = psycopg.AsyncConnection.connect
    async with await connect(**libpq(proxy, dbname="app@1500")) as connection:
        await connection.cancel_safe(timeout=5)
        await eventually(lambda: lakebase.gateway.cancels, "the cancel")
    (cancel,) = lakebase.gateway.cancels
    assert (cancel.sni, cancel.cancel_known) == (lakebase["two"].endpoint.host, True)
