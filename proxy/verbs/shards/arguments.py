"""The arguments of `shards VERB`: words, options, switches, and the flags of the settings.

For: splitting them, and judging what needs no database. Not for: bounds and keys, whose meaning
depends on the map.

A word may begin with one dash, as negative numbers do. What begins with two must follow `--`.
"""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

_END_OF_FLAGS: Final = "--"
_SWITCHES: Final = ("json",)
_DRY_RUN: Final = "dry-run"
_OPTIONS: Final = ("map",)
# As the catalogue's columns have them.
_MAP_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,50}")
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,63}")


class UsageError(Exception):
    """The arguments cannot be meant. The text says why."""


@dataclass(frozen=True, slots=True)
class Syntax:
    """What a verb takes beside --map, --json and the flags of the settings.

    `options` take a value, `switches` do not; `pairs` take two, and may come again. A verb that
    `writes` takes --dry-run.
    """

    usage: str
    words_min: int = 0
    words_max: int = 0
    options: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    writes: bool = False


@dataclass(frozen=True, slots=True)
class Arguments:
    """A verb's arguments; `flags` are those of the settings."""

    words: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()
    flags: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    """The values of the verb's option that takes two."""

    @property
    def as_json(self) -> bool:
        """Whether the answer is one JSON object."""
        return "json" in self.switches

    @property
    def dry_run(self) -> bool:
        """Whether nothing is to be changed."""
        return _DRY_RUN in self.switches

    def get(self, name: str) -> str | None:
        """Return the value of an option, None if it is not given."""
        return self.options.get(name)

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """Return the value of an option that is a whole number. Raises UsageError."""
        text = self.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise UsageError(f"--{name} is a whole number from {low} to {high}")
        return int(text)

    def shard(self) -> str | None:
        """Return the value of --shard. Raises UsageError for what is no name."""
        name = self.get("shard")
        return None if name is None else shard_name(name)

    def token(self) -> UUID | None:
        """Return the value of --token. Raises UsageError for what is none."""
        text = self.get("token")
        try:
            return None if text is None else UUID(text)
        except ValueError:
            raise UsageError("--token is what lock has printed") from None


def parse(arguments: Sequence[str], syntax: Syntax) -> Arguments:
    """Split the arguments after the verb. Raises UsageError."""
    words: list[str] = []
    options: dict[str, str] = {}
    switches: set[str] = set()
    flags: list[str] = []
    pairs: list[tuple[str, str]] = []
    known_options = (*_OPTIONS, *syntax.options)
    known_switches = (*_SWITCHES, *syntax.switches, *([_DRY_RUN] if syntax.writes else []))
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        if argument == _END_OF_FLAGS:
            words += rest
            break
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        if _is_setting(name):
            flags += [argument, *([] if equals else _values_of_setting(rest))]
        elif name in known_switches:
            if equals:
                raise UsageError(f"--{name} takes no value")
            switches.add(name)
        elif name in syntax.pairs and not equals:
            pairs.append((_next_value(name, rest), _next_value(name, rest)))
        elif name in known_options:
            if not equals:
                value = _next_value(name, rest)
            if options.setdefault(name, value) != value:
                raise UsageError(f"--{name} is given twice")
        else:
            raise UsageError(
                f"there is no --{name}"
                + _meant(name, (*known_options, *syntax.pairs), known_switches)
            )
    if not syntax.words_min <= len(words) <= syntax.words_max:
        raise UsageError(f"usage: lakebase-auth-proxy shards {syntax.usage}")
    return Arguments(tuple(words), options, frozenset(switches), tuple(flags), tuple(pairs))


def map_name(text: str) -> str:
    """Return the name of a map. Raises UsageError."""
    if not _MAP_NAME.fullmatch(text):
        raise UsageError("a map's name is 1 to 50 letters, digits, underscores and hyphens")
    return text


def shard_name(text: str) -> str:
    """Return the name of a shard. Raises UsageError."""
    if not _SHARD_NAME.fullmatch(text):
        raise UsageError("a shard's name is 1 to 63 letters, digits, underscores and hyphens")
    return text


def one_of(what: str, text: str, known: Sequence[str]) -> str:
    """Return the text if it is one of these words. Raises UsageError."""
    if text not in known:
        raise UsageError(f"{what} is one of {', '.join(known)}")
    return text


def _is_setting(name: str) -> bool:
    """Return whether a flag is one of the settings: --SECTION.KEY, or --config."""
    return name == "config" or "." in name


def _values_of_setting(rest: "deque[str]") -> list[str]:
    """Return the value that follows a setting's flag, if one does."""
    return [] if not rest or rest[0].startswith("--") else [rest.popleft()]


def _next_value(name: str, rest: "deque[str]") -> str:
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"--{name} needs a value")
    return rest.popleft()


def _meant(name: str, options: Sequence[str], switches: Sequence[str]) -> str:
    known = ", ".join(f"--{one}" for one in sorted((*options, *switches)))
    ending = f"; a word that begins with two dashes follows {_END_OF_FLAGS}"
    return f": this verb has {known}, and the settings{ending}" if name else ending
