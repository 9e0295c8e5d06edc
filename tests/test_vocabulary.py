"""Retired words stay out: of names, of files, and of the texts in code, tests and documents.

A name is a word that PostgreSQL, PgBouncer or asyncio uses; ARCHITECTURE.md has the glossary. Here
is what those names replaced, and a few words that make a sentence hard to read.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
SEARCHED: Final = ("proxy", "tests", "bench", "docs", "deploy")
SUFFIXES: Final = (".py", ".pyx", ".pxd", ".pyi", ".html", ".md", ".toml", ".yaml", ".yml")

# Not to be found anywhere, alone or as a part of an identifier: `nursery`, `_NurseryPid`.
WORDS: Final = frozenset(
    (
        # processes
        *("nursery", "nurse", "crew", "ledger", "desk", "entrance", "door", "mourn", "bury"),
        # sessions and where they go
        *("passage", "lull", "farewell", "leftovers", "unserved", "hurry", "gate"),
        # the workspace, the emulator, tests and benchmarks
        *("scout", "standin", "strike", "strikes", "struck", "heal", "planted", "roads"),
        *("trackers", "contest", "contenders"),
        # English
        *("whoever", "nobody", "shall", "mend", "mends", "mended"),
    )
)
PHRASES: Final = ("stand-in",)

# Not to be found as they stand; their parts are words that we use.
NAMES: Final = frozenset(
    (
        *(
            "Fleet",
            "Plan",
            "Way",
            "Account",
            "Accounts",
            "AccountSource",
            "Link",
            "Places",
            "places_taken",
        ),
        *("LiveSessions", "dismiss_silent", "give_back", "Engine", "OwnToken", "SharedToken"),
        *("MintForAny", "WrittenUpstream", "WrittenSession", "written_upstream"),
    )
)
# Files of `proxy/` that have other names now.
FILES: Final = frozenset(
    (
        *("plan.py", "targets.py", "accounts.py", "link.py", "closing.py", "ending.py", "life.py"),
        *("live.py", "shared.py", "exchange.py", "services.py", "sdk.py", "threads.py"),
        *("channel.py", "lag.py", "failures.py", "page.py", "totals.py", "samples.py"),
        *("service_manager.py", "serving.py", "routes.py", "values.py", "references.py"),
        *("translation.py", "problems.py", "changes.py", "effective.py", "building.py", "rows.py"),
        *("maps.py", "front.py", "arrival.py"),
    )
)

# Where one of them means something else, or is quoted.
ALLOWED: Final[dict[str, frozenset[str]]] = {
    # The system's user of this name, as which root's server processes run.
    "proxy/emulator/cluster.py": frozenset(("nobody",)),
    "bench/child_processes.py": frozenset(("nobody",)),
    "tests/support/closed_checkout.py": frozenset(("nobody",)),
}

_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def files() -> Iterator[Path]:
    """Return the files that people read, without this one and the log of changes."""
    for name in SEARCHED:
        yield from (path for path in sorted((ROOT / name).rglob("*")) if path.suffix in SUFFIXES)
    yield from sorted(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md")


def retired(text: str) -> set[str]:
    """Return the retired words and names in a text."""
    names = set(_IDENTIFIER.findall(text))
    words = {word.lower() for name in names for word in _WORD.findall(name)}
    phrases = {phrase for phrase in PHRASES if phrase in text.lower()}
    return (words & WORDS) | (names & NAMES) | phrases


def test_no_retired_word_is_used() -> None:
    found: dict[str, set[str]] = {}
    for path in files():
        name = str(path.relative_to(ROOT))
        words = retired(f"{name} {path.read_text()}") if path != Path(__file__) else set()
        if name.startswith("proxy/"):
            words |= {path.name} & FILES
        if words := words - ALLOWED.get(name, frozenset()):
            found[name] = words
    assert found == {}


def test_retired_words_are_found_within_names_and_texts() -> None:
    text = "class NurseryPid: pass  # Nobody's stand-in after the gateway. Link, linked, shallow."
    assert retired(text) == {"nursery", "nobody", "stand-in", "Link"}
