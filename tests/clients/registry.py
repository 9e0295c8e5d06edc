"""The clients that are tried: a folder for each language, with its programs and `clients.toml`.

For: which programs there are, how each is built and run, and what it lacks on this machine. Not
for: running them (`harness`).

A program knows nothing of tokens, of Databricks or of the proxy. It takes PGHOST, PGPORT, PGUSER,
PGDATABASE and PGSSLMODE from the environment and reads commands on standard input, one a line. It
answers each with any number of lines and then a line with a dot. An error that it does not expect
is `error: SQLSTATE message`; what its driver cannot do by its nature is `cannot: reason`.
"""

import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
HERE: Final = Path(__file__).parent
TOOLS: Final = HERE / "tools"

# What each program is asked, by the heading of the column; the words are the program's commands.
CHECKS: Final[Mapping[str, str]] = {
    "connects": "host, port, user and database are all it is told; no password",
    "key in the name": "the shard key in the database's name reaches the shard",
    "key in options": "the shard key as a startup option reaches the shard",
    "types": "values of many types go there and back, in text and in binary where it has that",
    "prepared": "300 distinct statements twice, more than it caches",
    "cursor": "100,000 rows in portions",
    "COPY": "10,000 rows in and out",
    "rollback": "an error in a transaction undoes it",
    "cancel": "a query that runs is cancelled; the connection serves on",
    "refusals": "for an uncovered key and a missing role the user sees message, hint and SQLSTATE; "
    "else what the cell says",
    "tokens": "a pool of 20 outlives three token lifetimes",
    "sleep": "the pool recovers by its own rules after the compute slept",
    "restart": "the pool recovers by its own rules after the server restarted",
    "close": "a polite close is counted as completed, and none as lost",
}


@dataclass(frozen=True, slots=True)
class Client:
    """A program: one driver with the pool that its users take."""

    name: str
    run: tuple[str, ...] = ()
    installed: tuple[str, ...] = ()  # a command that succeeds where the driver is installed
    not_tried: str = ""  # why there is no program


@dataclass(frozen=True, slots=True)
class Language:
    """The clients of one language, which share their environment and the harness's waits."""

    name: str
    folder: Path
    clients: tuple[Client, ...]
    build: tuple[tuple[str, ...], ...]  # commands, in order, before the first program runs
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def tried(self) -> list[Client]:
        """The clients that have a program."""
        return [client for client in self.clients if not client.not_tried]


@dataclass(frozen=True, slots=True)
class Tool:
    """A program of its own, which a test of its own tries: `test_tools*.py`."""

    name: str
    does: str
    not_tried: str = ""


def missing(client: Client) -> str:
    """Return the program that a client lacks here; empty if it is there."""
    return "" if shutil.which(client.run[0]) else f"{client.run[0]} is missing"


@cache
def languages() -> tuple[Language, ...]:
    """Return what the folders say."""
    return tuple(_language(file) for file in sorted(HERE.glob("*/clients.toml")))


@cache
def tools() -> tuple[Tool, ...]:
    """Return what `tools.toml` says."""
    file = TOOLS / "tools.toml"
    found = tomllib.loads(file.read_text())["tool"] if file.exists() else []
    return tuple(Tool(**one) for one in found)


def _language(file: Path) -> Language:
    said: dict[str, Any] = tomllib.loads(file.read_text())
    places = {
        "here": file.parent,
        "tools": ROOT / ".tools",
        "build": ROOT / ".tools" / "built" / file.parent.name,
    }

    def placed(words: Sequence[str]) -> tuple[str, ...]:
        return tuple(word.format(**places) for word in words)

    clients = [
        Client(
            one["name"],
            placed(one.get("run", ())),
            placed(one.get("installed", ())),
            one.get("not_tried", ""),
        )
        for one in said["client"]
    ]
    build = [placed(("mkdir", "-p", "{build}")), *map(placed, said.get("build", ()))]
    environment = {name: placed([x])[0] for name, x in said.get("environment", {}).items()}
    return Language(said["language"], file.parent, tuple(clients), tuple(build), environment)
