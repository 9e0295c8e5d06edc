"""`options` as PostgreSQL reads it, and its rewriting, which never re-renders a word (W21-W23)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.options import (
    Setting,
    Switch,
    Word,
    appended,
    escaped,
    parse_switches,
    settings,
    split_words,
    take_settings,
    without,
)
from proxy.wire.startup import V3_0, StartupMessage

# W21's table, result as the document gives it; the names are its own rows.
W21_VECTORS: list[tuple[bytes, list[tuple[bytes, bytes]]]] = [
    (rb"  -c    datestyle=German,\ YMD", [(b"datestyle", b"German, YMD")]),
    (
        rb"-ctimezone=Europe/Lisbon  -cdatestyle=German,\ YMD",
        [(b"timezone", b"Europe/Lisbon"), (b"datestyle", b"German, YMD")],
    ),
    (
        rb"--timezone=Europe/Lisbon --datestyle=German,\ YMD",
        [(b"timezone", b"Europe/Lisbon"), (b"datestyle", b"German, YMD")],
    ),
    (
        rb"-c t\imezone=\E\u\r\o\pe/Lisbon  -c dat\estyle\=\Ge\rman,\ YMD",
        [(b"timezone", b"Europe/Lisbon"), (b"datestyle", b"German, YMD")],
    ),
    (
        b"-c application_name=my-cron -c TimeZone=Etc/GMT+3",
        [(b"application_name", b"my-cron"), (b"TimeZone", b"Etc/GMT+3")],
    ),
    (b"-c\ttimezone=UTC\n-c\vdatestyle=ISO", [(b"timezone", b"UTC"), (b"datestyle", b"ISO")]),
    (b"-c timezone=UTC\\", [(b"timezone", b"UTC")]),
    (b"-c application_name=", [(b"application_name", b"")]),
    (b"-c a.b=c=d", [(b"a.b", b"c=d")]),
    (b"-c work-mem=5MB", [(b"work_mem", b"5MB")]),
    (
        b"--search_path=public -c work_mem=2047GB",
        [(b"search_path", b"public"), (b"work_mem", b"2047GB")],
    ),
    (b"", []),
    (b"    ", []),
    (b" \t\n\v\f\r", []),
    (b"-d", []),
    (b"foo", []),
    (b"-c", []),
    (b"-c timezone", []),
    (b"--timezone UTC", []),
    (b"-c -c", []),
    # Beyond the document: each also run against PostgreSQL 15.
    (b"-c -c application_name=x", []),
    (b"-c =5", [(b"", b"5")]),
    (b"-c=5", [(b"", b"5")]),
    (b"--=5", [(b"", b"5")]),
    (b"--=", [(b"", b"")]),
    (b"--", []),
    (b"-ec x=1", [(b"x", b"1")]),
    (b"-esc x=1 -Ecy=2", [(b"x", b"1"), (b"y", b"2")]),
    (b"-e-x=1 -e- y=2", [(b"x", b"1"), (b"y", b"2")]),
    (b"-eS 64 -cx=1", [(b"x", b"1")]),
    (b"-S64 -cx=1", [(b"x", b"1")]),
    (b"-S 64 -cx=1", [(b"x", b"1")]),
    (b"-d -cx=1", []),
    (b"-S", []),
    (b"-xc y=1", []),
    (b"- -cx=1", [(b"x", b"1")]),
    (b"-- -cx=1 --y=2", []),
    (b"-c a\\", []),
    (b"-c a.b=\xff\xfe", [(b"a.b", b"\xff\xfe")]),
    (b"-c --x=1", [(b"__x", b"1")]),
    (b"-c a.b=\\\\", [(b"a.b", b"\\")]),
    (b"-c a.b=\\\nx", [(b"a.b", b"\nx")]),
]


@pytest.mark.parametrize(("options", "expected"), W21_VECTORS)
def test_w21_settings_are_read_as_postgresql_reads_them(
    options: bytes, expected: list[tuple[bytes, bytes]]
) -> None:
    assert settings(options) == [Setting(name, value) for name, value in expected]


def test_w21_the_switch_minus_minus_alone_ends_the_switches() -> None:
    # PostgreSQL: invalid command-line argument for server process: -c.
    assert parse_switches(b"-- -c x=1") == [
        Switch((Word(b"--", b"--"),), None, is_last=True),
        Switch((Word(b"-c", b"-c"),), None),
        Switch((Word(b"x=1", b"x=1"),), None),
    ]


def test_w21_switches_without_an_argument_may_stand_in_front_in_the_same_word() -> None:
    assert parse_switches(rb"-\ec a=1 -S 64") == [
        Switch((Word(rb"-\ec", b"-ec"), Word(b"a=1", b"a=1")), Setting(b"a", b"1"), rb"-\e"),
        Switch((Word(b"-S", b"-S"), Word(b"64", b"64")), None),
    ]


WORDS: list[tuple[bytes, list[tuple[bytes, bytes]]]] = [
    (b"", []),
    (b" ", []),
    (b"\\", [(b"\\", b"")]),
    (b"a\\", [(b"a\\", b"a")]),
    (b"\\ ", [(b"\\ ", b" ")]),
    (b"\\\\", [(b"\\\\", b"\\")]),
    (b"a b", [(b"a", b"a"), (b"b", b"b")]),
    (b"a\\ b", [(b"a\\ b", b"a b")]),
    (b" a\tb\nc\vd\fe\rf ", [(byte, byte) for byte in (b"a", b"b", b"c", b"d", b"e", b"f")]),
    (b"a\x1cb", [(b"a\x1cb", b"a\x1cb")]),  # whitespace to str.isspace, not to isspace() in C
    (b"a\xc2\xa0b\xa0c", [(b"a\xc2\xa0b\xa0c", b"a\xc2\xa0b\xa0c")]),
    (b"'a b'", [(b"'a", b"'a"), (b"b'", b"b'")]),
    (b'"a"', [(b'"a"', b'"a"')]),
]


@pytest.mark.parametrize(("options", "expected"), WORDS)
def test_w21_words_end_at_ascii_whitespace_that_is_not_escaped(
    options: bytes, expected: list[tuple[bytes, bytes]]
) -> None:
    assert split_words(options) == [Word(raw, text) for raw, text in expected]


def test_w21_a_setting_keeps_its_words() -> None:
    assert parse_switches(rb"-c a\=b --c=d -ce=f g") == [
        Switch((Word(b"-c", b"-c"), Word(rb"a\=b", b"a=b")), Setting(b"a", b"b")),
        Switch((Word(b"--c=d", b"--c=d"),), Setting(b"c", b"d")),
        Switch((Word(b"-ce=f", b"-ce=f"),), Setting(b"e", b"f")),
        Switch((Word(b"g", b"g"),), None),
    ]


def test_w21_the_switch_itself_may_be_escaped() -> None:
    assert settings(rb"\-\c x=1 \--y=2") == [Setting(b"x", b"1"), Setting(b"y", b"2")]


REMOVALS: list[tuple[bytes, bytes]] = [
    (b"-c shard_key=7", b""),
    (b"-cshard_key=7", b""),
    (b"--shard_key=7", b""),
    (b"--shard-key=7", b""),
    (b"--SHARD-Key=7", b""),
    (rb"-c sh\ard_key=7", b""),
    (rb"\-c shard\_key\=7\ 8", b""),
    (b"-c a=1 -c shard_key=7 -c b=2", b"-c a=1 -c b=2"),
    (b"-c shard_key=7 -c shard_key=8", b""),
    (rb"  -c   dat\estyle=German,\ YMD --shard_key=7", rb"-c dat\estyle=German,\ YMD"),
    (b"-c shard_key=7 -c timezone=UTC\\", b"-c timezone=UTC\\"),
    (b"-c shard_key", b"-c shard_key"),
    (b"-c shard_key=7 -c", b"-c"),
    (b"--shard_key 7", b"--shard_key 7"),
    (b"-c x.shard_key=7", b"-c x.shard_key=7"),
    (b"-c -c shard_key=7", b"-c -c shard_key=7"),
    (b"-c a=shard_key=7", b"-c a=shard_key=7"),
    (b"-ec shard_key=7 -c b=2", b"-e -c b=2"),
    (rb"-\e\scshard_key=7", rb"-\e\s"),
    (b"-S 64 -cshard_key=7", b"-S 64"),
    (b"-d -cshard_key=7", b"-d -cshard_key=7"),
    (b"-- -c shard_key=7", b"-- -c shard_key=7"),
    (b"-d 5 foo -- -e", b"-d 5 foo -- -e"),
    (b"", b""),
    (b"   ", b""),
]


@pytest.mark.parametrize(("options", "expected"), REMOVALS)
def test_w22_only_the_named_setting_goes_and_all_else_stays_verbatim(
    options: bytes, expected: bytes
) -> None:
    assert without(options, [b"shard_key"]) == expected


def test_w20_the_routing_parameter_may_be_dotted_and_of_several_names() -> None:
    assert without(b"-c lake.key=1 -c key=2 -c other=3", [b"lake.key", b"key"]) == b"-c other=3"


@pytest.mark.parametrize("options", [b"-d 5", b"-e", b"foo bar", b"-ec x=1", b"-f s -W 3"])
def test_w23_unknown_switches_are_carried_along(options: bytes) -> None:
    assert without(options, [b"timezone"]) == options
    assert appended(options, [Setting(b"a", b"b")]) == options + b" -c a=b"


# W50's test values and what they are on the command line.
ESCAPES: list[tuple[bytes, bytes]] = [
    (b'"$user", "a\\b c"\t,pu\'blic', b'"$user",\\ "a\\\\b\\ c"\\\t,pu\'blic'),
    (b'"My Schema", public', b'"My\\ Schema",\\ public'),
    (b"", b""),
    (b"\xff\xfe caf\xe9", b"\xff\xfe\\ caf\xe9"),
    (b" \t\n\v\f\r\\", b"\\ \\\t\\\n\\\v\\\f\\\r\\\\"),
    (b"Etc/GMT+3", b"Etc/GMT+3"),
    (b"a=b-c", b"a=b-c"),
]


@pytest.mark.parametrize(("text", "expected"), ESCAPES)
def test_w50_whitespace_and_backslashes_are_escaped_and_nothing_else(
    text: bytes, expected: bytes
) -> None:
    assert escaped(text) == expected
    assert settings(b"-c search_path=" + expected) == [Setting(b"search_path", text)]


def test_w50_names_are_escaped_too() -> None:
    assert appended(b"", [Setting(b"a b\\c", b"d")]) == rb"-c a\ b\\c=d"


APPENDED: list[tuple[bytes, bytes]] = [
    (b"", b"-c x=1"),
    (b"-c a=1", b"-c a=1 -c x=1"),
    (b"-c a=1\\", b"-c a=1 -c x=1"),
    (b"-c a=1\\\\", b"-c a=1\\\\ -c x=1"),
    (b"-c a=1\\\\\\", b"-c a=1\\\\ -c x=1"),
    (b"-c a=1 ", b"-c a=1  -c x=1"),
    (b"-c a=1\\ ", b"-c a=1\\  -c x=1"),
    (b"\\", b" -c x=1"),
]


@pytest.mark.parametrize(("options", "expected"), APPENDED)
def test_w50_settings_go_after_and_an_unpaired_backslash_does_not_swallow_the_separator(
    options: bytes, expected: bytes
) -> None:
    assert appended(options, [Setting(b"x", b"1")]) == expected
    assert settings(expected) == [*settings(options), Setting(b"x", b"1")]


def test_w50_nothing_appended_leaves_the_words_alone() -> None:
    assert appended(b"", []) == b""
    assert appended(b"  -c a=1 ", []) == b"  -c a=1 "


def test_w50_the_order_of_the_extra_settings_is_kept() -> None:
    extra = [Setting(b"a", b"1"), Setting(b"b", b""), Setting(b"a", b"2")]
    assert appended(b"-c z=0", extra) == b"-c z=0 -c a=1 -c b= -c a=2"


LAST: list[tuple[bytes, bytes]] = [
    (b"-c", b"-c timezone=UTC -c"),
    (b"-c a=b -c", b"-c a=b -c timezone=UTC -c"),
    (b"-c -c", b"-c -c -c timezone=UTC"),
    (b"-S", b"-c timezone=UTC -S"),
    (b"-c a=b -eS\\", b"-c a=b -c timezone=UTC -eS"),
    (b"-S -S", b"-S -S -c timezone=UTC"),
    (b"--", b"-c timezone=UTC --"),
    (b"-c a=b --  foo", b"-c a=b -c timezone=UTC -- foo"),
]


@pytest.mark.parametrize(("options", "expected"), LAST)
def test_w50_a_word_that_would_swallow_what_is_appended_goes_last(
    options: bytes, expected: bytes
) -> None:
    # A switch that lacks its argument is an error, and is to stay the one that PostgreSQL makes
    # of it. `--` alone is none, but after it nothing is a switch.
    assert appended(options, [Setting(b"timezone", b"UTC")]) == expected


def test_settings_are_taken_out_of_parameters_and_options() -> None:
    pairs = ((b"user", b"a"), (b"X.y", b"1"), (b"options", b"-c x.y=2  -e -cz=3"), (b"x.y", b"4"))
    found, rest = take_settings(StartupMessage(V3_0, pairs), {b"x.y"})
    assert found == [(b"X.y", b"1"), (b"options", b"2"), (b"x.y", b"4")]
    assert rest.parameters == ((b"user", b"a"), (b"options", b"-e -cz=3"))


def test_a_message_without_the_settings_stays_as_it_is() -> None:
    pairs = ((b"options", b"-c  a=1"), (b"b", b"2"), (b"options", b""))
    message = StartupMessage(V3_0, pairs)
    assert take_settings(message, {b"x.y"}) == ([], message)
    only = StartupMessage(V3_0, ((b"options", b"-c x.y=1"),))
    assert take_settings(only, {b"x.y"}) == ([(b"options", b"1")], StartupMessage(V3_0, ()))


_PIECE = st.sampled_from([b"x.y", b"X.Y", b"x", b"y", b".", b"=", b" ", b"-", b"-c", b"--", b"\\"])


@given(st.lists(_PIECE, max_size=12).map(b"".join), st.sampled_from([b"x.y", b"x_y", b"x"]))
def test_every_setting_that_parsing_finds_is_taken_out(text: bytes, name: bytes) -> None:
    found, _ = take_settings(StartupMessage(V3_0, ((b"options", text),)), {name})
    parsed = [one.value for one in settings(text) if one.name.lower() == name]
    assert [value for _, value in found] == parsed
