"""Where keys are found, and what remains of the message, compared with PostgreSQL (S48, W20)."""

from collections.abc import Mapping

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.emulator.cluster import DATABASE, SUPERUSER, Cluster
from proxy.routing.key_sources import (
    BUILT_IN_PARAMETER,
    DatabasePattern,
    Occurrence,
    take_parameters,
    with_database,
    with_forwarded_key,
)
from proxy.wire.startup import V3_0, StartupMessage

NAMES = frozenset((BUILT_IN_PARAMETER, b"shard_key"))
USER = (b"user", b"app")


def startup(*pairs: tuple[bytes, bytes]) -> StartupMessage:
    return StartupMessage(V3_0, (USER, *pairs))


def taken(*pairs: tuple[bytes, bytes]) -> tuple[list[bytes], tuple[tuple[bytes, bytes], ...]]:
    """Return the keys of a message with these parameters, and the parameters that remain."""
    found, message = take_parameters(startup(*pairs), NAMES)
    assert message.parameters[0] == USER
    return [occurrence.text for occurrence in found], message.parameters[1:]


# options, the keys in it, and what remains of it.
OPTIONS: list[tuple[bytes, list[bytes], bytes]] = [
    (b"-c shard_key=42", [b"42"], b""),
    (b"-cshard_key=42", [b"42"], b""),
    (b"--shard-key=42", [b"42"], b""),
    (b"--Shard_Key=42", [b"42"], b""),
    (b"-c lakebase.shard_key=42", [b"42"], b""),
    (b"--lakebase.shard-key=42", [b"42"], b""),
    (b"-c shard_key=", [b""], b""),
    (b"-c shard_key=a=b@c", [b"a=b@c"], b""),
    (rb"-c shard_key=a\ b\\c", [rb"a b\c"], b""),
    (rb"-c sh\ard\_key\=4\2", [b"42"], b""),
    (rb"-c shard_key=\\xff00", [rb"\xff00"], b""),
    ("-c shard_key=grün🐘".encode(), ["grün🐘".encode()], b""),
    (b"-c shard_key=\xff", [b"\xff"], b""),
    (b"-c shard_key=" + b"k" * 200, [b"k" * 200], b""),
    (b"-c a=1 -c shard_key=7 --b=2", [b"7"], b"-c a=1 --b=2"),
    (b"-c shard_key=7 -c shard_key=8", [b"7", b"8"], b""),
    (rb"-c search_path=a\ b\\ -eshard_key", [], rb"-c search_path=a\ b\\ -eshard_key"),
    (b"-S 64 -cshard_key=7 -e", [b"7"], b"-S 64 -e"),
    (b"-ecshard_key=7 -S64", [b"7"], b"-e -S64"),
    (b"-d -cshard_key=7", [], b"-d -cshard_key=7"),
    (b"-c x=-cshard_key=7", [], b"-c x=-cshard_key=7"),
    (b"-c shard_key", [], b"-c shard_key"),
    (b"-c shard_key=7 -S", [b"7"], b"-S"),
    (b"-c my.shard_key=7", [], b"-c my.shard_key=7"),
    (b"  -c  a=1  ", [], b"  -c  a=1  "),
]


@pytest.mark.parametrize(("options", "keys", "rest"), OPTIONS)
def test_s48_a_key_in_options_is_taken_out_and_the_rest_stays(
    options: bytes, keys: list[bytes], rest: bytes
) -> None:
    assert taken((b"options", options)) == (keys, ((b"options", rest),) if rest else ())


def test_s48_a_key_is_a_startup_parameter_by_both_names_in_any_case() -> None:
    pairs = [(b"shard_key", b"1"), (b"Lakebase.Shard_KEY", b"2"), (b"shard_key", b"3")]
    assert taken(*pairs, (b"TimeZone", b"UTC")) == ([b"1", b"2", b"3"], ((b"TimeZone", b"UTC"),))


def test_s48_names_that_only_look_alike_stay() -> None:
    # In a startup parameter `-` does not mean `_`, and the value is not a command line.
    pairs = ((b"shard-key", b"1"), (b"my.shard_key", b"2"), (b"application_name", b"-cshard_key=7"))
    assert taken(*pairs) == ([], pairs)


def test_s48_every_occurrence_counts_in_repeated_options_too() -> None:
    pairs = [
        (b"options", b"-c shard_key=1 -e"),
        (b"shard_key", b"2"),
        (b"options", b"-cshard_key=3"),
    ]
    assert taken(*pairs) == ([b"1", b"2", b"3"], ((b"options", b"-e"),))


def test_the_sources_are_named_and_no_repr_shows_a_key() -> None:
    found, _ = take_parameters(
        startup((b"shard_key", b"k1"), (b"options", b"-cshard_key=k1")), NAMES
    )
    assert [occurrence.source for occurrence in found] == ["startup parameter", "options"]
    assert "k1" not in repr(found)


def test_a_database_is_replaced_or_left_out() -> None:
    message = startup((b"database", b"a"), (b"x", b"y"), (b"database", b"b"))
    assert with_database(message, b"c").parameters == (USER, (b"x", b"y"), (b"database", b"c"))
    assert with_database(message, None).parameters == (USER, (b"x", b"y"))


def test_a_key_is_forwarded_after_all_other_settings() -> None:
    message = startup((b"options", b"-c a=1"), (b"x", b"y"))
    assert with_forwarded_key(message, rb"a b\c").parameters == (
        USER,
        (b"x", b"y"),
        (b"options", rb"-c a=1 -c lakebase.shard_key=a\ b\\c"),
    )
    assert with_forwarded_key(startup(), b"7").get(b"options") == b"-c lakebase.shard_key=7"


# Settings that PostgreSQL accepts in options, so that both can be compared; some are refused.
WORDS = [
    *(b"-c work_mem=1MB", b"-cwork_mem=2MB", b"--work-mem=3MB", b"-S 99", b"-S99", b"-e", b"-es"),
    *(
        b"-c timezone=Etc/GMT+3",
        rb"-c datestyle=German,\ YMD",
        rb"-c search_path=a\\b\ \"c",
        b"-d 3",
    ),
    *(rb"-c sear\ch_path=\\", b"-c a.b=-clakebase.shard_key=9", b"-ec a.b=5", b"-eS 77", b"-E"),
    *(b"-c lakebase.shard_key=1", b"-clakebase.shard_key=2", b"--lakebase.shard-key=3", b"-f s"),
    *(rb"-c lake\base.Shard_key=a\ \\b", b"-ec lakebase.shard_key=4", b"-eslakebase.shard_key=5"),
    *(b"-e- lakebase.shard_key=6", b"-d -clakebase.shard_key=7", b"-r -- -clakebase.shard_key=8"),
    *(b"-D -c", b"lakebase.shard_key=9", b"-c", b"-S", b"--", b"foo", b"-x", b"-t pa", b"-v 1"),
]
SEPARATORS = st.sampled_from([b" ", b"  ", b"\t", b"\n"])
COMMAND_LINES = st.lists(
    st.tuples(st.sampled_from(WORDS), SEPARATORS).map(b"".join), min_size=1, max_size=6
).map(b"".join)

Outcome = str | tuple[str | None, list[tuple[str, str]]]


def outcome(cluster: Cluster, options: bytes) -> Outcome:
    """Return the key and the settings that PostgreSQL reads, or its refusal."""
    try:
        connection = psycopg.connect(
            host=str(cluster.directory), user=SUPERUSER, dbname=DATABASE, options=options.decode()
        )
    except psycopg.OperationalError as error:
        return str(error)
    with connection:
        rows = connection.execute(
            "SELECT name, setting FROM pg_settings"
            " UNION ALL SELECT 'a.b', current_setting('a.b', true) ORDER BY 1"
        ).fetchall()
        key = connection.execute("SELECT current_setting('lakebase.shard_key', true)").fetchone()
    assert key is not None
    return key[0], rows


# Few, since each starts a process of PostgreSQL.
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=COMMAND_LINES)
def test_s48_without_the_key_postgresql_has_the_same_settings(
    clusters: Mapping[str, Cluster], options: bytes
) -> None:
    found, message = take_parameters(startup((b"options", options)), NAMES)
    whole = outcome(clusters["one"], options)
    rest = outcome(clusters["one"], message.get(b"options") or b"")
    if isinstance(whole, str) or isinstance(rest, str):
        assert whole == rest
        return
    assert whole[0] == (found[-1].text.decode() if found else None)
    assert rest == (None, whole[1])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=COMMAND_LINES,
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)
def test_a_forwarded_key_reaches_postgresql_and_changes_nothing_else(
    clusters: Mapping[str, Cluster], options: bytes, text: str
) -> None:
    _, message = take_parameters(startup((b"options", options)), NAMES)
    rest = message.get(b"options") or b""
    forwarded = with_forwarded_key(message, text.encode()).get(b"options") or b""
    plain, seen = outcome(clusters["one"], rest), outcome(clusters["one"], forwarded)
    assert seen == (plain if isinstance(plain, str) else (text, plain[1]))


PATTERNS: list[tuple[str, bytes, tuple[bytes, bytes] | None]] = [
    ("{database}@{shard_key}", b"app@42", (b"app", b"42")),
    ("{database}@{shard_key}", b"app@a@b", (b"app", b"a@b")),
    ("{database}@{shard_key}", b"@42", (b"", b"42")),
    ("{database}@{shard_key}", b"app@", (b"app", b"")),
    ("{database}@{shard_key}", b"@", (b"", b"")),
    ("{database}@{shard_key}", b"app", None),
    ("{database}@{shard_key}", "büro.1@".encode() + b"k" * 128, ("büro.1".encode(), b"k" * 128)),
    ("{database}@{shard_key}", b"\xff@\xfe", (b"\xff", b"\xfe")),
    ("{shard_key}.{database}", b"42.app.x", (b"app.x", b"42")),
    ("{database}--{shard_key}", b"app---1", (b"app", b"-1")),
    ("t_{shard_key}", b"t_42", (b"", b"42")),
    ("t_{shard_key}", b"t_", (b"", b"")),
    ("t_{shard_key}", b"x_42", None),
    ("[{database}:{shard_key}]", b"[app:42]", (b"app", b"42")),
    ("[{database}:{shard_key}]", b"[app:42", None),
    ("aa{shard_key}aa", b"aaa", None),
    ("aa{shard_key}aa", b"aaaa", (b"", b"")),
]


@pytest.mark.parametrize(("template", "name", "expected"), PATTERNS)
def test_s48_a_database_name_is_split_at_the_first_separator(
    template: str, name: bytes, expected: tuple[bytes, bytes] | None
) -> None:
    split = DatabasePattern.parse(template).split(name)
    if expected is None:
        assert split is None
    else:
        assert split == (expected[0], Occurrence("database name", expected[1]))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "once"),
        ("{database}", "once"),
        ("{shard_key}@{shard_key}", "once"),
        ("{database}@{shard_key}.{database}", "at most once"),
        ("{database}{shard_key}", "text between"),
        ("{shard_key}", "fixed text"),
        ("{database}@{shard_key}{x}", "no fields but"),
        ("{{database}}@{shard_key}", "no fields but"),
        ("{database}\0{shard_key}", "NUL"),
    ],
)
def test_a_template_that_cannot_tell_is_refused(template: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DatabasePattern.parse(template)
