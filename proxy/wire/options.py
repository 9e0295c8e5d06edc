"""The startup parameter `options`: words, switches, and their rewriting.

`options` is a command line in one string (PostgreSQL: `pg_split_opts`, then
`process_postgres_switches`). A word ends at whitespace, a backslash makes the next byte literal.
Nothing here judges a switch: what is not `-c NAME=VALUE` or `--NAME=VALUE` is carried along as it
stands, and the upstream complains (W23).

Rewriting never re-renders: a word that stays keeps its bytes, escapes included (W22).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_WHITESPACE: Final = b" \t\n\v\f\r"
_BACKSLASH: Final = 0x5C


@dataclass(frozen=True, slots=True)
class Word:
    """One word: `raw` as written, `text` with its backslashes worked off."""

    raw: bytes
    text: bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """One `-c NAME=VALUE` in any of its three spellings, with `-` in the name turned into `_`."""

    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Switch:
    """One command-line switch, or a stray word: one or two words, and the setting if it is one."""

    words: tuple[Word, ...]
    setting: Setting | None


def split_words(options: bytes) -> list[Word]:
    """Return the words of an `options` string (W21)."""
    words: list[Word] = []
    position, end = 0, len(options)
    while position < end:
        if options[position] in _WHITESPACE:
            position += 1
            continue
        start, text = position, bytearray()
        while position < end and options[position] not in _WHITESPACE:
            if options[position] == _BACKSLASH:
                position += 1  # it vanishes; at the very end it does so alone
            if position < end:
                text.append(options[position])
                position += 1
        words.append(Word(options[start:position], bytes(text)))
    return words


def parse_switches(options: bytes) -> list[Switch]:
    """Return the switches in order. `-c` takes the next word, whatever that looks like."""
    switches: list[Switch] = []
    words = iter(split_words(options))
    for word in words:
        if word.text == b"-c":
            argument = next(words, None)
            if argument is None:
                switches.append(Switch((word,), None))
            else:
                switches.append(Switch((word, argument), _parse_setting(argument.text)))
        elif word.text[:2] in (b"-c", b"--") and len(word.text) > 2:
            switches.append(Switch((word,), _parse_setting(word.text[2:])))
        else:
            switches.append(Switch((word,), None))
    return switches


def settings(options: bytes) -> list[Setting]:
    """Return the settings that `options` makes, in order; what makes none is left out."""
    return [switch.setting for switch in parse_switches(options) if switch.setting is not None]


def without(options: bytes, names: Iterable[bytes]) -> bytes:
    """Return `options` less the settings of these lower-case names, other words kept verbatim.

    Empty when nothing remains. Names compare case-insensitively (W19, W22).
    """
    removed = frozenset(names)
    kept = [
        word.raw
        for switch in parse_switches(options)
        if switch.setting is None or switch.setting.name.lower() not in removed
        for word in switch.words
    ]
    return b" ".join(kept)


def appended(options: bytes, extra: Iterable[Setting]) -> bytes:
    """Return `options` with ` -c NAME=VALUE` for each extra setting behind it (W50).

    A backslash that stands alone at the end is dropped: it would swallow the separator. So would a
    `-c` that lacks its setting, an error that is to stay what it is: that goes last.
    """
    own = [_without_open_escape(options)] if options else []
    words = [
        word
        for setting in extra
        for word in (b"-c", escaped(setting.name) + b"=" + escaped(setting.value))
    ]
    return b" ".join([*words, *own] if _ends_in_open_switch(options) else [*own, *words])


def escaped(text: bytes) -> bytes:
    """Return the text as (part of) one word: a backslash before whitespace and backslashes."""
    return b"".join(
        b"\\" + bytes((byte,)) if byte == _BACKSLASH or byte in _WHITESPACE else bytes((byte,))
        for byte in text
    )


def _parse_setting(argument: bytes) -> Setting | None:
    name, equals, value = argument.partition(b"=")
    return Setting(name.replace(b"-", b"_"), value) if equals else None


def _ends_in_open_switch(options: bytes) -> bool:
    last = parse_switches(options)[-1:]
    return [[word.text for word in switch.words] for switch in last] == [[b"-c"]]


def _without_open_escape(options: bytes) -> bytes:
    backslashes = len(options) - len(options.rstrip(b"\\"))
    return options[:-1] if backslashes % 2 else options
