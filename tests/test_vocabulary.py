"""Retired words stay out: of names, of files, and of the texts in code, tests and documents.

A name is a word that PostgreSQL, PgBouncer or asyncio uses; ARCHITECTURE.md has the glossary. Here
is what those names replaced, and a few words that make a sentence hard to read.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
SEARCHED: Final = (
    *("proxy", "tests", "bench", "docs", "deploy", "examples", "release", ".ci", ".github"),
)
SUFFIXES: Final = frozenset(
    (
        *(".py", ".pyx", ".pxd", ".pyi", ".html", ".md", ".toml", ".yaml", ".yml", ".json"),
        *(".service", ".sh", ".sql", ".csv"),
    )
)
# Those without a suffix.
FILE_NAMES: Final = frozenset(("Makefile", "Dockerfile", "MANIFEST.in", ".dockerignore", "run"))

# Not to be found anywhere, alone or as a part of an identifier: `nursery`, `_NurseryPid`.
WORDS: Final = frozenset(
    (
        # processes
        *("nursery", "nurse", "crew", "ledger", "desk", "entrance", "door", "mourn", "bury"),
        *("hire", "hires", "hired", "employ", "employs", "employed"),
        # sessions and where they go
        *("passage", "lull", "farewell", "leftovers", "unserved", "hurry", "gate"),
        # the workspace, the emulator, tests and benchmarks
        *("scout", "standin", "strike", "strikes", "struck", "heal", "planted", "roads"),
        *("trackers", "contest", "contenders", "picture"),
        # English
        *("whoever", "nobody", "shall", "mend", "mends", "mended"),
    )
)
PHRASES: Final = ("stand-in",)

# Not to be found as they stand; their parts are words that we use.
NAMES: Final = frozenset(
    (
        *("Fleet", "Replacements", "Way", "Account", "Accounts", "AccountSource", "Link", "Places"),
        *("places_taken", "slots_taken", "LiveSessions", "dismiss_silent", "give_back", "_leave"),
        *("_moved", "_look", "_Hand", "_Order", "Engine", "OwnToken", "SharedToken", "MintForAny"),
        *("WrittenUpstream", "WrittenSession", "written_upstream", "DialProgress", "PhaseTimer"),
    )
)
# Not to be the name of a class: words of every sentence.
CLASSES: Final = frozenset(
    ("Targets", "Profile", "Quiet", "Shared", "Tokens", "Form", "Shown", "Hand", "Roads")
)
# Not to be defined in `proxy/` as a function or an attribute.
DEFINED: Final = frozenset(
    (
        *("looks", "look", "seen", "back", "orders", "news", "era", "place", "places", "way"),
        *("fleet", "link", "form", "life"),
    )
)
# Not in the code of the compiled relay.
NATIVE_NAMES: Final = frozenset(("opens", "seals", "owed", "turn", "window", "full", "engine"))
# Files of `proxy/` that have other names now: in any folder, or in the one that is named.
FILES: Final = frozenset(
    (
        *("plan.py", "targets.py", "accounts.py", "link.py", "closing.py", "ending.py", "life.py"),
        *("live.py", "shared.py", "exchange.py", "services.py", "sdk.py", "threads.py", "fleet.py"),
        *("channel.py", "lag.py", "failures.py", "page.py", "totals.py", "samples.py", "gate.py"),
        *("service_manager.py", "config/serving.py", "routes.py", "values.py", "references.py"),
        *("translation.py", "problems.py", "changes.py", "effective.py", "building.py", "rows.py"),
        *("maps.py", "front.py", "arrival.py", "minting.py", "config/lakebase.py"),
        *("config/keys.py", "routing/sources.py", "workers/messages.py"),
    )
)

# Where one of them means something else, or is quoted.
ALLOWED: Final[dict[str, frozenset[str]]] = {
    # The system's user of this name, as which root's server processes run.
    "proxy/emulator/server_account.py": frozenset(("nobody",)),
    "bench/child_processes.py": frozenset(("nobody",)),
    "tests/support/closed_checkout.py": frozenset(("nobody",)),
}

_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_DEFINED: Final = re.compile(r"(?:\bdef |\bself\.)_?([a-z_]+)(?:\(|\b *[:=])")
_CLASS: Final = re.compile(r"^ *(?:cdef |final )*class _?(\w+)", re.MULTILINE)


def files() -> Iterator[Path]:
    """Return the files that people read, without this one and the log of changes."""
    found = [path for name in SEARCHED for path in sorted((ROOT / name).rglob("*"))]
    for path in (*found, *sorted(ROOT.glob("*"))):
        is_text = path.suffix in SUFFIXES or path.name in FILE_NAMES
        if is_text and path.is_file() and path.name != "CHANGELOG.md":
            yield path


def retired(text: str) -> set[str]:
    """Return the retired words and names in a text."""
    names = set(_IDENTIFIER.findall(text))
    words = {word.lower() for name in names for word in _WORD.findall(name)}
    phrases = {phrase for phrase in PHRASES if phrase in text.lower()}
    classes = {f"class {name}" for name in set(_CLASS.findall(text)) & CLASSES}
    return (words & WORDS) | (names & NAMES) | phrases | classes


def retired_in(path: Path) -> set[str]:
    """Return the retired words and names in a file and in its own name."""
    name, text = str(path.relative_to(ROOT)), path.read_text()
    found = retired(f"{name} {text}")
    if name.startswith("proxy/"):
        found |= {path.name, f"{path.parent.name}/{path.name}"} & FILES
        found |= set(_DEFINED.findall(text)) & DEFINED
    if name.startswith("proxy/native/"):
        code = re.sub(r"#.*|\"{3}(?s:.*?)\"{3}", "", text)
        found |= set(_IDENTIFIER.findall(code)) & NATIVE_NAMES
    return found


def test_no_retired_word_is_used() -> None:
    found: dict[str, set[str]] = {}
    for path in files():
        name = str(path.relative_to(ROOT))
        words = retired_in(path) if path != Path(__file__) else set()
        if words := words - ALLOWED.get(name, frozenset()):
            found[name] = words
    assert found == {}


@pytest.mark.parametrize(
    "name",
    [
        *("config.example.toml", "pyproject.toml", "Makefile", "Dockerfile", "docker-compose.yml"),
        *("deploy/systemd/lakebase-auth-proxy.service", "deploy/prometheus/alerts.yaml"),
        *("deploy/grafana/lakebase-auth-proxy.json", "proxy/native/lanes.pyx", ".ci/run"),
    ],
)
def test_what_is_no_python_is_searched_as_well(name: str) -> None:
    assert ROOT / name in set(files())


def test_retired_words_are_found_within_names_and_texts() -> None:
    text = "class NurseryPid: pass  # Nobody's stand-in after the gateway. Link, linked, shallow."
    assert retired(text) == {"nursery", "nobody", "stand-in", "Link"}
    assert retired("class _Shown(Base):\n    # Shown where Tokens are.") == {"class Shown"}


# No first word of a docstring: they do not name what a function does.
VAGUE_VERBS: Final = frozenset(("Tell", "Give", "Let", "Have", "Say", "Be", "Note", "Spell"))


def unclear_docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the first words of docstrings that CONTRIBUTING.md asks to begin in another way."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            first = text.split()[0].rstrip(".,;:")
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            is_property = not decorators.isdisjoint(("property", "cached_property"))
            if first not in ("The", "Whether") if is_property else first in VAGUE_VERBS:
                yield f"{node.name}: {text.splitlines()[0]}"


def test_docstrings_begin_with_a_verb_and_those_of_properties_with_a_noun() -> None:
    found = {
        str(path.relative_to(ROOT)): sorted(unclear)
        for path in files()
        if path.suffix == ".py"
        and (unclear := list(unclear_docstrings(ast.parse(path.read_text()))))
    }
    assert found == {}
