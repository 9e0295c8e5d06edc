"""The startup parameter `options`: words, switches, and how to rewrite them.

`options` is a command line in one string (PostgreSQL: `pg_split_opts`, then
`process_postgres_switches`). A word ends at whitespace, a backslash makes the next byte literal.
Switches are parsed as by `getopt`: `-ec x=1` is `-e` and `-c x=1`, and `-S -cx=1` makes no setting.
Switches are not validated here: anything but `-c NAME=VALUE` or `--NAME=VALUE` is forwarded
unchanged, and the upstream rejects what is wrong (W23).

Rewriting does not re-encode: a word that stays keeps its bytes, escapes included (W22).
"""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final

from proxy.wire.startup import StartupMessage

OPTIONS: Final = b"options"

_WHITESPACE: Final = b" \t\n\v\f\r"
_BACKSLASH: Final = 0x5C
_END_OF_SWITCHES: Final = b"--"

# The letters of process_postgres_switches (PostgreSQL 16 to 18). Those of the first list take the
# rest of their word as an argument or, if it is empty, the next word, even one that is a switch.
_LETTERS_WITH_ARGUMENT: Final = b"BCDNSWcdfhkprtv-"
_LETTERS_ALONE: Final = b"EFOPTbeijlns"
_SETTING_LETTERS: Final = b"c-"


@dataclass(frozen=True, slots=True)
class Word:
    """One word: `raw` as written, `text` with its backslashes processed."""

    raw: bytes
    text: bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """One `-c NAME=VALUE` in any of its three spellings; each `-` in the name becomes `_`."""

    name: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Switch:
    """One command-line switch, or a stray word: one or two words, and the setting if it is one.

    `flags` are the switches without argument before it in the same word, as written: the `-e` of
    `-ec x=1`. `is_last`: a word appended after it would be its argument, or a stray word.
    """

    words: tuple[Word, ...]
    setting: Setting | None
    flags: bytes = b""
    is_last: bool = False


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
                position += 1  # dropped; at the end of the string it escapes nothing
            if position < end:
                text.append(options[position])
                position += 1
        words.append(Word(options[start:position], bytes(text)))
    return words


def parse_switches(options: bytes) -> list[Switch]:
    """Return the switches in order. `--` ends them: the words after it are stray."""
    switches: list[Switch] = []
    words = iter(split_words(options))
    for word in words:
        if word.text == _END_OF_SWITCHES:
            switches.append(Switch((word,), None, is_last=True))
            switches += [Switch((stray,), None) for stray in words]
        else:
            switches.append(_parse_switch(word, words))
    return switches


def settings(options: bytes) -> list[Setting]:
    """Return the settings that `options` makes, in order; other switches are left out."""
    return [switch.setting for switch in parse_switches(options) if switch.setting is not None]


def without(options: bytes, names: Iterable[bytes]) -> bytes:
    """Return `options` without the settings of these lower-case names; other words are unchanged.

    The result has exactly one space between two words, and is empty if no word remains. Names
    compare case-insensitively (W19, W22).
    """
    removed = frozenset(names)
    kept: list[bytes] = []
    for switch in parse_switches(options):
        if switch.setting is None or switch.setting.name.lower() not in removed:
            kept += _raw(switch)
        elif switch.flags:
            kept.append(switch.flags)
    return b" ".join(kept)


def take_settings(
    message: StartupMessage, names: AbstractSet[bytes]
) -> tuple[list[tuple[bytes, bytes]], StartupMessage]:
    """Return the settings of these lower-case names, and the message without them.

    Each has the parameter that it was found in: its own name, or `options`, which is searched for
    every spelling. Names compare case-insensitively, as PostgreSQL's settings do (W19); each
    repetition is returned. What stays in the message is byte for byte what the client sent.
    """
    found: list[tuple[bytes, bytes]] = []
    kept: list[tuple[bytes, bytes]] = []
    for name, value in message.parameters:
        if name.lower() in names:
            found.append((name, value))
        elif name == OPTIONS and _may_have(value, names):
            inside = [one.value for one in settings(value) if one.name.lower() in names]
            found += [(OPTIONS, text) for text in inside]
            rest = without(value, names) if inside else value
            if rest or not inside:
                kept.append((name, rest))
        else:
            kept.append((name, value))
    return found, replace(message, parameters=tuple(kept)) if found else message


def _may_have(options: bytes, names: AbstractSet[bytes]) -> bool:
    """Return false if none of these names is in `options`, in a tenth of the time of parsing."""
    folded = options.replace(b"\\", b"").replace(b"-", b"_").lower()
    return any(name in folded for name in names)


def appended(options: bytes, extra: Iterable[Setting]) -> bytes:
    """Return `options` with ` -c NAME=VALUE` appended for each extra setting (W50).

    An unpaired backslash at the end is dropped: it would escape the separator. A last switch that
    lacks its argument would take the first `-c` as its argument, and PostgreSQL would report
    another error. After `--`, no word is a switch. In both cases the settings are inserted before
    that switch.
    """
    own = _without_open_escape(options)
    words = [
        word
        for setting in extra
        for word in (b"-c", escaped(setting.name) + b"=" + escaped(setting.value))
    ]
    switches = parse_switches(own)
    for at, switch in enumerate(switches):
        if words and switch.is_last:
            before = [raw for switch in switches[:at] for raw in _raw(switch)]
            after = [raw for switch in switches[at:] for raw in _raw(switch)]
            return b" ".join([*before, *words, *after])
    return b" ".join([own, *words] if options else words)


def escaped(text: bytes) -> bytes:
    """Return the text as one word or part of one, with whitespace and backslashes escaped."""
    return b"".join(
        b"\\" + bytes((byte,)) if byte == _BACKSLASH or byte in _WHITESPACE else bytes((byte,))
        for byte in text
    )


def _parse_switch(word: Word, following: Iterator[Word]) -> Switch:
    """Return the switch that begins with this word; its argument may be the following word."""
    at = _argument_letter(word.text)
    if at is None:
        return Switch((word,), None)
    words, argument = [word], word.text[at + 1 :]
    if not argument:
        next_word = next(following, None)
        if next_word is None:
            return Switch((word,), None, is_last=True)
        words.append(next_word)
        argument = next_word.text
    if word.text[at] not in _SETTING_LETTERS:
        return Switch(tuple(words), None)
    flags = _raw_prefix(word.raw, at) if at > 1 else b""
    return Switch(tuple(words), _parse_setting(argument), flags)


def _argument_letter(text: bytes) -> int | None:
    """Return the index of the first letter that takes an argument, or None."""
    if text.startswith(b"-"):
        for at in range(1, len(text)):
            if text[at] in _LETTERS_WITH_ARGUMENT:
                return at
            if text[at] not in _LETTERS_ALONE:
                return None
    return None


def _raw_prefix(raw: bytes, length: int) -> bytes:
    """Return the raw bytes of the first `length` bytes of a word's text."""
    at = 0
    for _ in range(length):
        at += 2 if raw[at] == _BACKSLASH else 1
    return raw[:at]


def _raw(switch: Switch) -> list[bytes]:
    return [word.raw for word in switch.words]


def _parse_setting(argument: bytes) -> Setting | None:
    name, equals, value = argument.partition(b"=")
    return Setting(name.replace(b"-", b"_"), value) if equals else None


def _without_open_escape(options: bytes) -> bytes:
    backslashes = len(options) - len(options.rstrip(b"\\"))
    return options[:-1] if backslashes % 2 else options
