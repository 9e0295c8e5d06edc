"""StartupMessages, direct and through the proxy: options, settings, and what is refused."""

# ruff: noqa: E501 - an exchange is a row of a table, and a row is a line

from typing import Final

import pytest

from proxy.emulator.cluster import CLIENT_ID, DATABASE
from tests.differential.conftest import DirectAndProxied
from tests.differential.frontend import (
    LEAVING,
    TERMINATE,
    Exchange,
    Text,
    ask,
    in_three_ways,
    say,
    startup,
    until_end,
)
from tests.support.cuts import Cut

pytestmark = pytest.mark.asyncio(loop_scope="module")

Pair = tuple[Text, Text]

_SHOWN: Final = ask(
    "SELECT name, setting FROM pg_settings WHERE name IN ('TimeZone', 'DateStyle', 'work_mem',"
    " 'search_path', 'application_name', 'client_encoding', 'IntervalStyle', 'extra_float_digits',"
    " 'statement_timeout', 'standard_conforming_strings', 'geqo') ORDER BY name COLLATE \"C\"",
    "SELECT current_schemas(true), current_setting('a.b', true), current_setting('my.own', true)",
    "RESET ALL",
)


def _settings(name: str, *pairs: Pair) -> Exchange:
    """Return an exchange that logs in with these pairs, shows settings, and resets them.

    Where the login fails the later steps find the stream at its end, with and without the proxy.
    """
    return Exchange(name, (say(startup(*pairs)), _SHOWN, LEAVING))


def _options(name: str, options: Text) -> Exchange:
    return _settings(f"options {name}", ("options", options))


def _refused(name: str, *pairs: Pair) -> Exchange:
    return Exchange(name, (until_end(startup(*pairs)),))


def _identity(name: str, *identity: Pair) -> Exchange:
    return Exchange(name, (until_end(startup(identity=identity), TERMINATE),))


def _packet(name: str, body: bytes) -> Exchange:
    """Return an exchange of one startup packet with this body after the version."""
    content = b"\0\3\0\0" + body
    return Exchange(name, (until_end((len(content) + 4).to_bytes(4, "big") + content),))


_BODY: Final = startup()[8:]

# The vectors of W21, and a few more of each rule.
OPTIONS: Final = (
    _options("split at spaces", r"  -c    datestyle=German,\ YMD"),
    _options("without a space after c", r"-ctimezone=Europe/Lisbon  -cdatestyle=German,\ YMD"),
    _options("of two dashes", r"--timezone=Europe/Lisbon --datestyle=German,\ YMD"),
    _options("with letters escaped", "-c t\\imezone=\\E\\u\\r\\o\\pe/Lisbon  -c dat\\estyle\\=\\Ge\\rman,\\ YMD"),
    _options("with dashes and a plus", "-c application_name=my-cron -c TimeZone=Etc/GMT+3"),
    _options("split at other whitespace", "-c\ttimezone=UTC\n-c\vdatestyle=ISO"),
    _options("split at form feed and return", "-c\ftimezone=Asia/Tokyo\r-c\fgeqo=off"),
    _options("with a trailing backslash", "-c timezone=Asia/Tokyo\\"),
    _options("with two trailing backslashes", "-c application_name=x\\\\"),
    _options("with an empty value", "-c application_name="),
    _options("with equals signs in the value", "-c a.b=c=d"),
    _options("with a dash for an underscore", "-c work-mem=5MB"),
    _options("with two settings of two forms", "--search_path=public -c work_mem=2047GB"),
    _options("that set twice", "-c work_mem=5MB -c work_mem=6MB"),
    _options("empty", ""),
    _options("of spaces only", "   "),
    _options("-d", "-d"),
    _options("of a stray word", "foo"),
    _options("of a bare double dash", "-- -c x=1"),
    _options("ending in -c", "-c work_mem=5MB -c"),
    _options("-c without equals", "-c timezone"),
    _options("double dash without equals", "--timezone UTC"),
    _options("-c -c", "-c -c"),
    _options("-e for European dates", "-e"),
    _options("of a cluster", "-ec work_mem=5MB"),
    _options("-S for work_mem", "-S 5000"),
    _options("-f without sequential scans", "-fs -c work_mem=5MB"),
    _options("-W 0", "-W 0"),
    _options("that only a superuser may set", "-c log_statement=all"),
    _options("that only the start may set", "-c port=5433"),
    _options("of an unknown setting", "-c no_such_setting=1"),
    _options("of a bad value", "-c timezone=Mars/Base"),
    _options("of a bad unit", "-c work_mem=5XB"),
    _options("with quotes", """-c search_path="$user",\\ 'a\\ b' -c application_name="q\""""),
    _options("that are not UTF-8", b"-c application_name=\xe9\xff -c work_mem=5MB"),
    _options("of a custom setting's case", "-c My.Own=Value"),
    _options("with an empty name", "-c =x"),
    _options("of 9 kB", "-c my.own=" + "x" * 9000),
)  # fmt: skip

# W18, W19, W50: pairs of their own, their values and their precedence.
SETTINGS: Final = (
    _settings("nothing more"),
    _settings("an application name", ("application_name", "told")),
    _settings("an application name in other letters", ("Application_Name", "told")),
    _settings("an application name of 100 bytes", ("application_name", "a" * 100)),
    _settings("an application name that is not ASCII", ("application_name", "é\t\x01")),
    _settings("an empty application name", ("application_name", "")),
    _settings("a name in other letters", ("TIMEZONE", "Asia/Tokyo")),
    _settings("a search path with every mark", ("search_path", '"$user", "a\\b c"\t,pu\'blic')),
    _settings("a search path with spaces", ("search_path", '"My Schema", public')),
    _settings("an empty search path", ("search_path", "")),
    _settings("a value that is not UTF-8", ("my.own", b"\xe9\xff\xfe")),
    _settings("a value with line ends", ("my.own", "a\nb\r\nc\vd\fe")),
    _settings("a value of backslashes", ("my.own", "\\\\a\\ \\")),
    _settings("a value like a switch", ("my.own", "-c work_mem=5MB --geqo=off")),
    _settings("a value of spaces", ("my.own", "   ")),
    _settings("a value with equals signs", ("my.own", "a=b=c")),
    _settings("client_encoding LATIN1", ("client_encoding", "LATIN1")),
    _settings("client_encoding by quotes", ("client_encoding", "'utf-8'")),
    _settings("client_encoding unknown", ("client_encoding", "KLINGON")),
    _settings("the pairs of pgjdbc", ("client_encoding", "UTF8"), ("DateStyle", "ISO"), ("TimeZone", "Europe/Berlin"), ("extra_float_digits", "2"), ("application_name", "PostgreSQL JDBC Driver")),
    _settings("a pair beats options", ("TimeZone", "Asia/Tokyo"), ("options", "-c TimeZone=Europe/Lisbon")),
    _settings("a pair after options beats them too", ("options", "-c TimeZone=Europe/Lisbon"), ("TimeZone", "Asia/Tokyo")),
    _settings("an application name beats options", ("application_name", "pair"), ("options", "-c application_name=word")),
    _settings("a pair after an open escape", ("options", "-c geqo=off\\"), ("TimeZone", "Asia/Tokyo")),
    _settings("a pair after an argument's switch", ("options", "-c"), ("TimeZone", "Asia/Tokyo")),
    _settings("a repeated setting", ("TimeZone", "Asia/Tokyo"), ("TimeZone", "Europe/Lisbon")),
    _settings("a setting repeated in other letters", ("timezone", "Asia/Tokyo"), ("TIMEZONE", "Europe/Lisbon")),
    _settings("repeated options", ("options", "-c geqo=off"), ("options", "-c work_mem=5MB")),
    _settings("a repeated application name", ("application_name", "a"), ("application_name", "b")),
    _settings("a repeated database", ("database", "postgres"), ("database", DATABASE)),
    _settings("a repeated user", ("user", "no-such-user"), ("user", CLIENT_ID)),
    _settings("a setting that is already so", ("standard_conforming_strings", "on")),
    _settings("a custom setting", ("my.own", "x"), ("a.b", "y")),
    _settings("a name with a space", ("no such", "x")),
    _settings("a dotted name with a space", ("my.o wn", "x")),
    _settings("a name with an equals sign", ("a=b", "x")),
    _settings("a dotted name with an equals sign", ("my.a=b", "x")),
    _settings("a name with a dash", ("work-mem", "5MB")),
    _settings("a dotted name with a dash", ("my.o-wn", "x")),
    _settings("a name with a backslash", ("a\\b", "x")),
    _settings("a name that is not UTF-8", (b"\xe9", "x")),
    _settings("user in capitals is a setting", ("USER", "x")),
    _settings("an unknown setting", ("shard_key", "x")),
    _settings("two unknown settings", ("first_unknown", "x"), ("second_unknown", "y")),
    _settings("a bad value", ("TimeZone", "Mars/Base")),
    _settings("a bad value with a hint", ("IntervalStyle", "klingon")),
    _settings("a value out of range", ("statement_timeout", "-2")),
    _settings("what only a superuser may set", ("log_statement", "all")),
    _settings("what only the start may set", ("port", "5433")),
    _settings("what cannot be set", ("server_version", "99")),
    _settings("what is set per backend", ("ignore_system_indexes", "on")),
    _settings("session_authorization", ("session_authorization", "postgres")),
    _settings("role", ("role", "demo-engineers")),
    _settings("is_superuser", ("is_superuser", "on")),
    _settings("fifty settings", *((f"my.n{n}", "v" * n) for n in range(50))),
)  # fmt: skip

# W15, W16, W17 and the login's own errors.
REFUSED: Final = (
    _packet("layout, no final NUL", _BODY[:-1]),
    _packet("layout, no NUL at all", b"user"),
    _packet("layout, a name without a value", _BODY[:-1] + b"TimeZone\0\0"),
    _packet("layout, a name cut short", _BODY[:-1] + b"TimeZone"),
    _packet("layout, an empty name before the end", b"user\0x\0\0database\0y\0\0"),
    _packet("layout, bytes after the end", _BODY + b"x"),
    _packet("layout, NULs after the end", _BODY + b"\0\0"),
    _packet("layout, nothing", b""),
    _packet("layout, only the end", b"\0"),
    _packet("layout, two NULs", b"\0\0"),
    _identity("no user", ("database", DATABASE)),
    _identity("an empty user", ("user", ""), ("database", DATABASE)),
    _identity("a user that is emptied", ("user", "x"), ("user", ""), ("database", DATABASE)),
    _identity("no user and a bad setting", ("no_such", "x")),
    _identity("a missing database", ("user", CLIENT_ID), ("database", "no_such_database")),
    _identity("a database of 70 bytes", ("user", CLIENT_ID), ("database", "d" * 70)),
    _identity("a database that is not UTF-8", ("user", CLIENT_ID), ("database", b"\xff\xfe")),
    _identity("a missing database and a bad setting", ("user", CLIENT_ID), ("database", "no_such_database"), ("no_such", "x")),
    *(
        _refused(f"replication {value or 'empty'}", ("replication", value))
        for value in ("maybe", "", "o", "2", "-1", "10", "Database", "databas", "truely", " true", "true ", "on off", "é")
    ),
    *(
        _refused(f"replication {value} without the right", ("replication", value))
        for value in ("true", "on", "database")
    ),
    _refused("replication bad, then good", ("replication", "maybe"), ("replication", "off")),
    _identity("replication bad and no user", ("replication", "maybe")),
)  # fmt: skip

REPLICATION_OFF: Final = tuple(
    _settings(f"replication {value}", ("replication", value))
    for value in ("false", "off", "no", "0", "f", "n", "of", "FALSE", "Off", "fAl")
)
EXCHANGES: Final = (*OPTIONS, *SETTINGS, *REFUSED, *REPLICATION_OFF)


@in_three_ways(*EXCHANGES)
async def test_answers_are_those_of_postgres(
    exchange: Exchange, cut: Cut, both: DirectAndProxied
) -> None:
    await both.compare(exchange, cut)
