"""Programs in other languages, and their drivers as the distribution's packages install them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.proxy_process import run_to_end
from tests.support.tools import lack

# lib/pq sends its settings in the order of a Go map, another one each time: another key of a pool.
SETTINGS_IN_ANY_ORDER: Final = "go"
JDBC: Final = Path("/usr/share/java/postgresql.jar")

_GO_PATH: Final = Path("/usr/share/gocode")
_GO_POSTGRES: Final = _GO_PATH / "src" / "github.com" / "lib" / "pq"
# lib/pq panics where this is set, and tests set it to keep libpq away from a person's own files.
GO_RUN: Final = ("env", "-u", "PGSERVICEFILE", "go", "run")
GO_IS_THERE: Final = ("sh", "-c", f"command -v go && test -d {_GO_POSTGRES}")
# The packages' sources as they lie there: nothing is asked of any network.
GO_ENVIRONMENT: Final = {"GOPATH": str(_GO_PATH), "GO111MODULE": "off"}


@dataclass(frozen=True, slots=True)
class Language:
    """A program, the file it belongs into, and how that is run."""

    program: str
    file: str
    command: tuple[str, ...]
    driver: tuple[str, ...] = ()  # succeeds where the driver is installed
    environment: Mapping[str, str] = field(default_factory=dict)


async def lacks_driver(language: Language) -> str:
    """Return what is not installed for a language; empty if nothing is missing."""
    if shutil.which(language.command[0]) is None:
        return f"{language.command[0]} is missing"
    if language.driver and (await run_to_end(*language.driver))[0]:
        return "its driver is missing"
    return ""


async def need_driver(what: str, language: Language) -> None:
    """Skip, loudly, where a language or its driver is not installed."""
    missing = await lacks_driver(language)
    lack(what, [missing] if missing else [])


def place(language: Language, directory: Path, *arguments: str) -> tuple[str, ...]:
    """Write a program into this directory; return the command that runs it."""
    file = directory / language.file
    file.write_text(language.program)
    return (*language.command, str(file), *arguments)
