"""`options`: read as PostgreSQL reads it, and rewritten without touching what stays."""

from hypothesis import assume, given
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
    without,
)
from proxy.wire.startup import V3_0, StartupMessage, parse_first_packet
from proxy.wire.upstream_message import upstream_message
from proxy.wire.violations import ClientViolation

WHITESPACE = b" \t\n\v\f\r"
# Rich in what matters: switches, escapes, every kind of whitespace, the names used below.
PIECES = [
    b"-c",
    b"--",
    b"-",
    b"=",
    b"\\",
    b"key",
    b"K",
    b"e",
    b"S",
    b"_",
    b"a",
    b"'",
    b'"',
    b"\xff",
    b"\x1c",
]
PIECES += [bytes([byte]) for byte in WHITESPACE]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map(b"".join)
NO_NUL = st.binary(max_size=30).filter(lambda text: b"\0" not in text)
NAMES = NO_NUL.filter(lambda name: bool(name) and not set(name) & set(b"=-"))
EXTRA = st.lists(st.builds(Setting, NAMES, st.one_of(TEXTS, NO_NUL)), max_size=4)


def pg_split_opts(options: bytes) -> list[bytes]:
    """Split as postinit.c does, written after its description: the reference."""
    words: list[bytes] = []
    rest = options
    while rest := rest.lstrip(WHITESPACE):
        word = b""
        while rest and rest[:1] not in [bytes([byte]) for byte in WHITESPACE]:
            if rest[:1] == b"\\":
                rest = rest[1:]
            word, rest = word + rest[:1], rest[1:]
        words.append(word)
    return words


@given(st.one_of(TEXTS, NO_NUL))
def test_words_are_postgresqls_words(options: bytes) -> None:
    assert [word.text for word in split_words(options)] == pg_split_opts(options)


@given(st.one_of(TEXTS, NO_NUL))
def test_nothing_but_whitespace_stands_between_words(options: bytes) -> None:
    at = 0
    for word in split_words(options):
        start = options.index(word.raw, at)
        assert not options[at:start].strip(WHITESPACE)
        at = start + len(word.raw)
    assert not options[at:].strip(WHITESPACE)


@given(st.one_of(TEXTS, NO_NUL))
def test_switches_are_all_words_in_order(options: bytes) -> None:
    words = [word for switch in parse_switches(options) for word in switch.words]
    assert words == split_words(options)


@given(st.one_of(TEXTS, NO_NUL).filter(bool))
def test_escaped_text_is_one_word_that_reads_back(text: bytes) -> None:
    assert split_words(escaped(text)) == [Word(escaped(text), text)]


def is_closed(options: bytes) -> bool:
    """Return whether nothing may follow: a switch lacks its argument, or there is `--`."""
    return any(switch.is_last for switch in parse_switches(appended(options, [])))


@given(st.one_of(TEXTS, NO_NUL), EXTRA)
def test_w50_appended_settings_read_back_after_the_others(
    options: bytes, extra: list[Setting]
) -> None:
    assert settings(appended(options, extra)) == settings(options) + extra


@given(st.one_of(TEXTS, NO_NUL), EXTRA)
def test_w50_what_was_there_is_still_there_byte_for_byte(
    options: bytes, extra: list[Setting]
) -> None:
    assume(not is_closed(options))
    raw = appended(options, extra)
    assert raw.startswith(appended(options, []))
    assert options[:-1] in (raw[: len(options) - 1], options)
    assert raw[: len(options)] in (options, options[:-1] + b" ", options[:-1])


@given(st.one_of(TEXTS, NO_NUL), st.sets(st.sampled_from([b"key", b"a", b"_a", b"k"])))
def test_w22_without_removes_the_named_and_keeps_the_rest_verbatim(
    options: bytes, names: set[bytes]
) -> None:
    kept: list[Switch] = []
    for switch in parse_switches(options):
        if switch.setting is None or switch.setting.name.lower() not in names:
            kept.append(switch)
        elif switch.flags:
            kept += parse_switches(switch.flags)
    rewritten = without(options, names)
    assert parse_switches(rewritten) == kept
    assert [word.raw for word in split_words(rewritten)] == [
        word.raw for switch in kept for word in switch.words
    ]
    assert without(rewritten, names) == rewritten


SETTABLE = st.one_of(st.sampled_from([b"TimeZone", b"a.b", b"x-y", b"p=q", b"_pq_.f"]), NO_NUL)
PAIRS = st.lists(st.tuples(SETTABLE.filter(bool), st.one_of(TEXTS, NO_NUL)), max_size=5)
OWN = (b"user", b"database", b"application_name", b"replication", b"options")


@given(TEXTS, PAIRS)
def test_w50_an_upstream_message_carries_five_names_and_every_setting(
    options: bytes, pairs: list[tuple[bytes, bytes]]
) -> None:
    assume(not is_closed(options))
    extra = [
        Setting(name, value)
        for name, value in pairs
        if name.lower() not in OWN and not name.startswith(b"_pq_.")
    ]
    assume(not any(name in OWN or name.lower() == b"application_name" for name, _ in pairs))
    client = StartupMessage(V3_0, ((b"user", b"app"), (b"options", options), *pairs))
    try:
        wire = upstream_message(client, b"role", b"main").encode()
    except ClientViolation:
        assert any(set(b"=-") & set(setting.name) for setting in extra)
        return
    upstream = parse_first_packet(wire)
    assert isinstance(upstream, StartupMessage)
    names = [name for name, _ in upstream.parameters]
    assert set(names) <= set(OWN)
    assert len(names) == len(set(names))
    assert upstream.get(b"user") == b"role"
    assert settings(upstream.get(b"options") or b"") == settings(options) + extra
