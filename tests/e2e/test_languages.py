"""The examples of docs/languages.md that are marked to run: they do, just as they are printed.

A person's copy differs in the port alone, and so does the test's.
"""

import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.emulator.cluster import CLIENT_ID
from proxy.server.app import App
from tests.packaging.manifests import ROOT
from tests.support.languages import GO_ENVIRONMENT, GO_IS_THERE, GO_RUN, JDBC, SETTINGS_IN_ANY_ORDER
from tests.support.pooling import both_modes, states, taken
from tests.support.proxy_process import run_to_end
from tests.support.running import eventually, psql_path
from tests.support.tools import lack

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DOCUMENT = ROOT / "docs" / "languages.md"
RUNS = "✓"


@dataclass(frozen=True, slots=True)
class Example:
    """The first block of code below a heading."""

    heading: str
    language: str
    code: str


def examples() -> list[Example]:
    sections = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    found = []
    for section in sections:
        heading = section.partition("\n")[0]
        if block := re.search(r"```(\w+)\n(.*?)```", section, re.DOTALL):
            found.append(Example(heading, block[1], block[2]))
    return found


def _node(file: Path) -> list[str]:
    return ["node", str(file)]


# How a file of each language is run; its suffix is what the program expects.
RUNNERS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "sh": ("sh", lambda file: ["sh", str(file)]),
    "python": ("py", lambda file: [sys.executable, str(file)]),
    "js": ("js", _node),
    "go": ("go", lambda file: [*GO_RUN, str(file)]),
    "java": ("java", lambda file: ["java", "-cp", str(JDBC), str(file)]),
    "ruby": ("rb", lambda file: ["ruby", str(file)]),
    "php": ("php", lambda file: ["php", str(file)]),
}
# A command that succeeds when a language's driver is installed.
DRIVERS = {
    "js": ["node", "-e", "require('pg')"],
    "go": list(GO_IS_THERE),
    "java": ["test", "-f", str(JDBC)],
    "ruby": ["ruby", "-e", "require 'pg'"],
    "php": ["php", "-r", "exit(extension_loaded('pdo_pgsql') ? 0 : 1);"],
}

MARKED = [example for example in examples() if example.heading.endswith(RUNS)]


async def need_language(example: Example) -> None:
    """Skip, loudly, where the language or its driver is not installed."""
    program = RUNNERS[example.language][1](Path("x"))[0]
    missing = [] if shutil.which(program) else [f"{program} is missing"]
    if not missing and example.language in DRIVERS:
        code, _, _ = await run_to_end(*DRIVERS[example.language])
        missing += ["its driver is missing"] if code else []
    lack(f"the example for {example.heading.removesuffix(RUNS).strip()}", missing)


def placed(example: Example, directory: Path, port: int) -> Path:
    """Write an example into a file, with the port that this test's proxy has."""
    assert "5432" in example.code
    file = directory / f"Main.{RUNNERS[example.language][0]}"
    code = example.code.replace("5432", str(port))
    if example.language == "sh":  # the wheel's psql, which need not be on the path
        code = f"PATH={psql_path().parent}:$PATH\n{code}"
    file.write_text(code)
    return file


@both_modes
@pytest.mark.parametrize("example", MARKED, ids=lambda example: example.heading)
async def test_an_example_logs_in_and_asks(
    example: Example, proxy: App, tmp_path: Path, upstream_keys: Mapping[str, object]
) -> None:
    await need_language(example)
    file = placed(example, tmp_path, proxy.listen_port)
    environment = GO_ENVIRONMENT if example.language == "go" else None
    command = RUNNERS[example.language][1](file)
    for _ in range(2 if upstream_keys else 1):  # the second one in a session of the first
        code, out, err = await run_to_end(*command, environment=environment)
        assert code == 0, err
        assert CLIENT_ID in out
        await eventually(lambda: set(states(proxy)) <= {"idle"}, "its sessions are kept")
    if upstream_keys and example.language != SETTINGS_IN_ANY_ORDER:
        assert taken(proxy)["reused"]


def test_every_language_of_the_readme_is_in_the_document() -> None:
    headings = " ".join(example.heading for example in examples())
    for language in ("psql", "Python", "Node", "Go", "Java", "Ruby", "PHP", ".NET", "Rust"):
        assert language in headings


def test_what_cannot_be_run_is_not_marked() -> None:
    assert {example.language for example in MARKED} == set(RUNNERS)
