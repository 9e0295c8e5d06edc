"""The StartupMessage that goes upstream: W50, W51, and what of W13, W17 and W18 concerns it."""

import pytest

from proxy.wire.options import Setting, settings
from proxy.wire.startup import V3_0, V3_2, StartupMessage
from proxy.wire.upstream_message import UnpooledSetting, pooled_message, upstream_message
from proxy.wire.violations import ClientViolation
from tests.wire.driving import startup


def upstream_of(*pairs: tuple[bytes, bytes]) -> StartupMessage:
    client = StartupMessage(V3_2, ((b"user", b"app"), *pairs))
    return upstream_message(client, b"role", b"databricks_postgres")


TARGET = ((b"user", b"role"), (b"database", b"databricks_postgres"))

W50_TABLE = {
    "nothing further": ((), ()),
    "the client's user and database are left out": (
        ((b"user", b"eve"), (b"database", b"other")),
        (),
    ),
    "settings are folded in packet order": (
        ((b"search_path", b"a"), (b"work_mem", b"5MB"), (b"search_path", b"b")),
        ((b"options", b"-c search_path=a -c work_mem=5MB -c search_path=b"),),
    ),
    "after the client's own options, wherever these stood": (
        ((b"TimeZone", b"UTC"), (b"options", b"-c a.b=1"), (b"client_encoding", b"LATIN1")),
        ((b"options", b"-c a.b=1 -c TimeZone=UTC -c client_encoding=LATIN1"),),
    ),
    "of repeated options the last": (
        ((b"options", b"-c a=1"), (b"options", b"-c b=2")),
        ((b"options", b"-c b=2"),),
    ),
    "an unpaired backslash is dropped": (
        ((b"options", b"-c a=1\\"), (b"b", b"2")),
        ((b"options", b"-c a=1 -c b=2"),),
    ),
    "empty options are left out": (((b"options", b""),), ()),
    "raw options stay raw": (
        ((b"options", rb"  --a\=1   -c b=x\ y -e "),),
        ((b"options", rb"  --a\=1   -c b=x\ y -e "),),
    ),
    "application_name stays a pair": (
        ((b"application_name", b"my cron"), (b"options", b"-c application_name=x")),
        ((b"application_name", b"my cron"), (b"options", b"-c application_name=x")),
    ),
    "application_name in any spelling, the last one": (
        ((b"Application_Name", b"a"), (b"APPLICATION_NAME", b"b")),
        ((b"application_name", b"b"),),
    ),
    "replication stays a pair": (
        ((b"replication", b"database"),),
        ((b"replication", b"database"),),
    ),
    "a path with quotes, backslash, tab and blank": (
        ((b"search_path", b'"$user", "a\\b c"\t,pu\'blic'),),
        ((b"options", b'-c search_path="$user",\\ "a\\\\b\\ c"\\\t,pu\'blic'),),
    ),
    "a quoted schema": (
        ((b"search_path", b'"My Schema", public'),),
        ((b"options", b'-c search_path="My\\ Schema",\\ public'),),
    ),
    "an empty value": (((b"search_path", b""),), ((b"options", b"-c search_path="),)),
    "a value that is not UTF-8": (
        ((b"a.b", b"caf\xe9 \xff"),),
        ((b"options", b"-c a.b=caf\xe9\\ \xff"),),
    ),
    "a value with = and -": (((b"a.b", b"c=d-e"),), ((b"options", b"-c a.b=c=d-e"),)),
    "a name with a blank is one word": (((b"a b", b"c"),), ((b"options", b"-c a\\ b=c"),)),
}


@pytest.mark.parametrize("name", W50_TABLE)
def test_w50_only_five_pairs_go_upstream(name: str) -> None:
    sent, further = W50_TABLE[name]
    message_upstream = upstream_of(*sent)
    assert message_upstream.version == V3_0
    assert message_upstream.parameters == TARGET + further
    assert message_upstream.encode() == startup(TARGET + further)


def test_w13_protocol_options_are_never_forwarded() -> None:
    sent = ((b"_pq_.foo", b"1"), (b"_pq_.", b""), (b"_PQ_.foo", b"2"))
    assert upstream_of(*sent).parameters == (*TARGET, (b"options", b"-c _PQ_.foo=2"))


def test_w17_options_of_a_replication_client_go_through_raw() -> None:
    options = rb"-c datestyle=ISO  -c intervalstyle=postgres -c extra_float_digits=3"
    message_upstream = upstream_of((b"replication", b"true"), (b"options", options))
    assert message_upstream.get(b"options") == options
    assert message_upstream.get(b"replication") == b"true"


def test_w18_startup_pairs_keep_beating_options() -> None:
    message_upstream = upstream_of((b"work_mem", b"1MB"), (b"options", b"-c work_mem=2MB"))
    options = message_upstream.get(b"options") or b""
    assert settings(options)[-1] == Setting(b"work_mem", b"1MB")


def test_w50_a_value_cannot_smuggle_a_further_setting() -> None:
    message_upstream = upstream_of((b"a.b", b"x -c role=postgres\n-crole=y\\"))
    assert settings(message_upstream.get(b"options") or b"") == [
        Setting(b"a.b", b"x -c role=postgres\n-crole=y\\")
    ]


# What PostgreSQL 15 says of such a name in a startup pair.
MISNAMED = [
    (b"work-mem", "42704", 'unrecognized configuration parameter "work-mem"'),
    (b"a=b", "42704", 'unrecognized configuration parameter "a=b"'),
    (b"caf\xe9-", "42704", 'unrecognized configuration parameter "caf\N{REPLACEMENT CHARACTER}-"'),
    (b"a.b-c", "42602", 'invalid configuration parameter name "a.b-c"'),
    (b"a.b=c", "42602", 'invalid configuration parameter name "a.b=c"'),
]


@pytest.mark.parametrize(("name", "sqlstate", "text"), MISNAMED)
def test_w50_a_name_that_no_command_line_can_say_is_refused_as_postgresql_does(
    name: bytes, sqlstate: str, text: str
) -> None:
    with pytest.raises(ClientViolation) as caught:
        upstream_of((name, b"1"))
    assert (caught.value.sqlstate, caught.value.message) == (sqlstate, text)
    assert caught.value.reason == "unknown_parameter"


@pytest.mark.parametrize(("length", "fits"), [(9_998, True), (9_999, True), (10_000, False)])
def test_w51_a_message_that_grew_too_long_is_not_sent(length: int, fits: bool) -> None:
    short = len(upstream_of((b"a.b", b"")).encode())
    pair = (b"a.b", b"x" * (length - short))
    if fits:
        assert len(upstream_of(pair).encode()) == length
        return
    with pytest.raises(ClientViolation) as caught:
        upstream_of(pair)
    assert (caught.value.sqlstate, caught.value.reason) == ("54000", "startup_too_long")


def test_w51_escaping_alone_can_make_it_too_long() -> None:
    assert len(startup([(b"user", b"app"), (b"a.b", b" " * 5_000)])) < 10_000
    with pytest.raises(ClientViolation, match="too long"):
        upstream_of((b"a.b", b" " * 5_000))


CHECK = (Setting(b"a.check", b"2"),)


def with_defaults(*pairs: tuple[bytes, bytes]) -> bytes | None:
    client = StartupMessage(V3_0, ((b"user", b"app"), *pairs))
    return upstream_message(client, b"role", b"main", CHECK).get(b"options")


def test_w50_defaults_come_before_what_the_client_sets() -> None:
    # PostgreSQL sets what comes last. A stray backslash or `--` of the client's cannot reach them.
    assert with_defaults() == b"-c a.check=2"
    assert with_defaults((b"options", b"-c a.check=7 --")) == b"-c a.check=2 -c a.check=7 --"
    assert with_defaults((b"a.check", b"7")) == b"-c a.check=2 -c a.check=7"


def test_w51_defaults_do_not_make_a_message_too_long() -> None:
    longest = b"-c b.c=" + b"x" * 9_940
    assert with_defaults((b"options", longest)) == longest


# -- pooled hosts --------------------------------------------------------------------------------


def pooled_of(*pairs: tuple[bytes, bytes]) -> StartupMessage:
    client = StartupMessage(V3_2, ((b"user", b"app"), *pairs))
    return pooled_message(client, b"role", b"databricks_postgres")


def test_w50_what_a_pooler_tracks_goes_as_startup_pairs() -> None:
    # In options, where a pooler takes nothing, each driver's client_encoding was refused.
    message = pooled_of(
        (b"client_encoding", b"UTF8"),
        (b"options", b"-c TimeZone=UTC --datestyle=ISO -c client_encoding=LATIN1"),
        (b"IntervalStyle", b"iso_8601"),
        (b"standard_conforming_strings", b"on"),
        (b"application_name", b"my cron"),
        (b"_pq_.x", b"1"),
        (b"replication", b"off"),
    )
    assert message == StartupMessage(
        V3_0,
        (
            *TARGET,
            (b"TimeZone", b"UTC"),
            (b"datestyle", b"ISO"),
            (b"client_encoding", b"UTF8"),
            (b"IntervalStyle", b"iso_8601"),
            (b"standard_conforming_strings", b"on"),
            (b"application_name", b"my cron"),
            (b"replication", b"off"),
        ),
    )


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        ((b"search_path", b"a"), "search_path"),
        ((b"extra_float_digits", b"2"), "extra_float_digits"),
        ((b"options", b"-c work_mem=5MB"), "work_mem"),
        ((b"options", b"-c client_encoding=UTF8 --statement-timeout=1"), "statement_timeout"),
        ((b"options", b"-e"), "-e"),
        ((b"options", b"-ec TimeZone=UTC"), "-ec TimeZone=UTC"),
        ((b"options", b"-c"), "-c"),
        ((b"options", b"stray"), "stray"),
    ],
)
def test_any_other_setting_is_refused_by_its_name(pair: tuple[bytes, bytes], name: str) -> None:
    with pytest.raises(UnpooledSetting) as refused:
        pooled_of(pair)
    assert refused.value.name == str(refused.value) == name


def test_w51_a_packet_for_a_pooler_has_the_same_bound() -> None:
    with pytest.raises(ClientViolation) as refused:
        pooled_of((b"application_name", b"x" * 10_000))
    assert refused.value.sqlstate == "54000"
