"""What a verb takes: its words, its options, and the flags of the settings.

For: declaring a verb's syntax, and splitting the arguments by it. argparse reads a verb's options;
the settings' flags are merged with their other sources in `config`. Not for: what a verb does.

Flags may stand anywhere. A word may begin with one dash, as negative numbers do. What begins with
two and is no flag follows `--`.

Invariant: no error shows a value or a word that may be a secret.
"""

import argparse
import difflib
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn, Self

from proxy.config import likely_flags, take_flags

PROGRAM: Final = "lakebase-auth-proxy"
END_OF_FLAGS: Final = "--"
# It has verbs of its own.
_NESTING: Final = "shards"
# More than fit in a command line.
ANY_NUMBER: Final = 1 << 30

# A terminal that was never widened.
_COLUMNS: Final = 80
# argparse's errors, and ours.
_ERRORS: Final = {
    "expected one argument": "needs a value",
    "expected 2 arguments": "needs two values",
    "ignored explicit argument": "takes no value",
}


class UsageError(Exception):
    """The arguments cannot be meant. The text says why."""


class UnknownFlags(UsageError):
    """Flags that do not exist. `settings` are the settings' flags of a verb that has settings.

    They may be wrong too, and so are to be reported with these.
    """

    def __init__(self, sentences: Iterable[str], settings: Sequence[str] | None = None) -> None:
        super().__init__("\n".join(sentences))
        self.settings = settings


@dataclass(frozen=True, slots=True)
class Option:
    """A flag of a verb: a switch, or with a `metavar` one that takes a value, or a `pair` of them.

    A pair may be given several times.
    """

    name: str
    help: str = ""
    metavar: str = ""
    pair: bool = False

    @property
    def flag(self) -> str:
        """The option as it is written."""
        return f"--{self.name}"

    @property
    def values(self) -> int:
        """The number of values that it takes. With one it may be given once."""
        return 2 if self.pair else int(bool(self.metavar))


JSON: Final = Option("json", "print one JSON object")
PRINT_CONFIG: Final = Option("print-config", "print the values in force and their sources, and end")


@dataclass(frozen=True, slots=True)
class Syntax:
    """What a verb takes. `usage` begins with its name, `summary` says what it does.

    `sections` are those of the settings that matter to it, for its help: it takes the flags of all.
    Without any it has no settings.
    """

    usage: str
    summary: str = ""
    words_min: int = 0
    words_max: int = 0
    options: tuple[Option, ...] = ()
    sections: tuple[str, ...] = ()

    @property
    def shown_usage(self) -> str:
        """The usage as lines of a terminal."""
        return textwrap.fill(
            f"usage: {PROGRAM} {self.usage}",
            _COLUMNS,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )


@dataclass(frozen=True, slots=True)
class Arguments:
    """A verb's arguments.

    `flags` are those of the settings, `pairs` the values of its pair, and `last` those of the
    words that follow `--`.
    """

    words: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()
    flags: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    last: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, arguments: Sequence[str], syntax: Syntax) -> Self:
        """Split the arguments after the verb. Raises UsageError."""
        flags, rest, after = _split(arguments, [option.flag for option in syntax.options])
        found, words = OptionParser(syntax).parse_known_args(rest)
        unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
        if not syntax.sections:
            unknown += [flag.partition("=")[0] for flag in flags]
        if unknown:
            settings = flags if syntax.sections else None
            raise UnknownFlags((_unknown(flag, syntax) for flag in unknown), settings)
        words += after[1:]
        if not syntax.words_min <= len(words) <= syntax.words_max:
            many = "few" if len(words) < syntax.words_min else "many"
            switches = [flag for flag in flags if "=" not in flag] if many == "many" else []
            hint = f": {switches[-1]} takes true or false" if switches else ""
            raise UsageError(f"too {many} arguments{hint}\n{syntax.shown_usage}")
        given = {one: getattr(found, one.name.replace("-", "_")) for one in syntax.options}
        return cls(
            tuple(words),
            {one.name: _only(one, given[one]) for one in given if one.values == 1 and given[one]},
            frozenset(one.name for one, value in given.items() if value is True),
            tuple(flags),
            tuple((low, high) for one in given if one.pair for low, high in given[one] or ()),
            tuple(after[1:]),
        )

    @property
    def as_json(self) -> bool:
        """Whether the answer is one JSON object."""
        return self.has(JSON)

    def has(self, switch: Option) -> bool:
        """Return whether a switch is given."""
        return switch.name in self.switches

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


class OptionParser(argparse.ArgumentParser):
    """argparse for the options of one verb, which raises UsageError and ends no process."""

    def __init__(self, syntax: Syntax) -> None:
        usage = syntax.shown_usage.removeprefix("usage: ")
        super().__init__(PROGRAM, usage, syntax.summary, add_help=False, allow_abbrev=False)
        options = self.add_argument_group("options")
        for option in syntax.options:
            if option.metavar:
                names = option.metavar.split()
                options.add_argument(
                    option.flag,
                    help=option.help,
                    action="append",
                    nargs=2 if option.pair else None,
                    metavar=tuple(names) if option.pair else names[0],
                )
            else:
                options.add_argument(option.flag, help=option.help, action="store_true")
        # One dash begins a word, or a value such as -inf.
        self._negative_number_matcher = re.compile("-[^-]")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, without the value that argparse shows."""
        flag = message.removeprefix("argument ").partition(":")[0]
        why = next((text for said, text in _ERRORS.items() if said in message), "is wrong")
        raise UsageError(f"{flag} {why}")


def take_verb(
    arguments: Sequence[str], syntaxes: Mapping[str, Syntax], own: Collection[str] = ()
) -> tuple[str, list[str]]:
    """Return the verb, which is the first argument that is one's name, and the other arguments.

    The value of a verb's option is no verb. The verb is empty if there are only flags that exist:
    `own` are those without a verb. Raises UsageError.
    """
    options = [option for syntax in syntaxes.values() for option in syntax.options]
    values = {option.flag: option.values for option in options}
    flags, rest, after = _split(arguments, values)
    for at, word in enumerate(rest):
        # The verbs of `shards` have options of their own: `--map run shards show`.
        other = int(_NESTING in rest[at + 1 :])
        taken = (_values_of(rest[at - n], values, other) for n in range(1, min(at, 2) + 1))
        is_value = any(count >= n for n, count in enumerate(taken, 1))
        if word in syntaxes and not is_value:
            return word, [*flags, *rest[:at], *rest[at + 1 :], *after]
    if not rest or rest[0].startswith("-"):
        known = [*values, *own]
        given = [word.partition("=")[0] for word in rest if word.startswith("--")]
        if unknown := [flag for flag in given if flag not in known]:
            raise UnknownFlags(_unknown_without_verb(flag, known) for flag in unknown)
        return "", list(arguments)
    near = did_you_mean(difflib.get_close_matches(rest[0], syntaxes, n=1))
    word = repr(rest[0]) if re.fullmatch("[A-Za-z_-]+", rest[0]) else "of that name"
    raise UsageError(f"there is no verb {word}{near or ': ' + one_of(syntaxes)}")


def _values_of(word: str, known: Mapping[str, int], other: int) -> int:
    """Return how many values follow a word: `other` of them if it is a flag that is not known."""
    is_other = word.startswith("--") and "=" not in word
    return known.get(word, other if is_other else 0)


def one_of(names: Iterable[str]) -> str:
    """Return the end of a sentence that lists names, on lines of their own."""
    listed = textwrap.fill(", ".join(names), _COLUMNS - 2, break_on_hyphens=False)
    return "one of\n" + textwrap.indent(listed, "  ")


def did_you_mean(near: Sequence[str]) -> str:
    """Return the end of a sentence about a misspelled word, empty if none is near."""
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _split(
    arguments: Sequence[str], own: Collection[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return the settings' flags, the arguments before `--`, and what begins there.

    `own` are a verb's: `--workspace` of `add-shard` is not the section of that name.
    """
    at = list(arguments).index(END_OF_FLAGS) if END_OF_FLAGS in arguments else len(arguments)
    flags, rest = take_flags(arguments[:at], others=own)
    return flags, rest, list(arguments[at:])


def _only(option: Option, values: Sequence[str]) -> str:
    if len(set(values)) > 1:
        raise UsageError(f"{option.flag} is given twice")
    return values[0]


def _unknown_without_verb(flag: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(flag, known, n=1) or likely_flags(flag)
    return f"there is no {flag}{did_you_mean(near) or ' without a verb: --help lists the verbs'}"


def _unknown(flag: str, syntax: Syntax) -> str:
    own = sorted(option.flag for option in syntax.options)
    near = difflib.get_close_matches(flag, [*own, "--help", "--version"], n=1)
    if not near and syntax.sections:
        near = likely_flags(flag)
    has = ", ".join([*own, "the settings"] if syntax.sections else own)
    return f"there is no {flag}" + (did_you_mean(near) or f": this verb has {has or 'no flags'}")
