"""From a map in a file to a catalogue, with the commands of docs/shard-maps.md as they are written.

Each command is a process of its own, as people run it. Only what is of the emulator is replaced:
endpoints, its port, roles.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Final

import pytest

from proxy.exit_codes import EXIT_OK
from tests.support.catalogue import Stores
from tests.support.proxy_process import run_to_end

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "shard-maps.md"
_COMMAND: Final = re.compile(r"^\$ lakebase-auth-proxy (shards .*)$", re.MULTILINE)
TIMEOUT_SECONDS: Final = 120


def commands(title: str) -> list[list[str]]:
    """Return the commands of a chapter of the document, in words."""
    chapter = DOCUMENT.read_text().partition(f"### {title}\n")[2].partition("\n##")[0]
    return [shlex.split(found) for found in _COMMAND.findall(chapter)]


def csv_of_the_document() -> str:
    (csv,) = re.findall(r"```csv\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return str(csv)


async def run(stores: Stores, folder: Path, words: list[str]) -> str:
    """Run a command with what the emulator has in place of the document's names."""
    replaced = {
        "projects/shop/branches/main/endpoints/eu": stores.endpoint("one"),
        "projects/shop/branches/main/endpoints/us": stores.endpoint("two"),
        "map_reader": stores.roles.reader,
        "app_login": stores.roles.session,
        "tenants.csv": str(folder / "tenants.csv"),
    }
    arguments = [replaced.get(word, word) for word in words]
    if "add-shard" in words:
        arguments += ["--port", str(stores.lakebase.port)]
    variable = {"LAKEBASE_PROXY_CONFIG": str(folder / "shards.toml")}
    code, out, err = await run_to_end(
        sys.executable, "-m", "proxy", *arguments, environment=variable
    )
    assert code == EXIT_OK, f"{words}: {err}"
    return out


@pytest.mark.slow
async def test_the_ten_commands_of_the_document_lead_to_a_catalogue(
    stores: Stores, tmp_path: Path
) -> None:
    (tmp_path / "tenants.csv").write_text(csv_of_the_document())
    stores.file(tmp_path).rename(tmp_path / "shards.toml")
    found = commands("From a CSV map to a catalogue in ten commands")
    assert len(found) == 9  # and the one that names the file
    printed = [await run(stores, tmp_path, words) for words in found]
    assert re.search(r"^1000 +2000 +us +online", printed[-4], re.MULTILINE)
    assert re.search(r"^shard +us$", printed[-1], re.MULTILINE)
    assert "as the shard has it:" in printed[-1]
    offline, sessions, online = [
        await run(stores, tmp_path, words) for words in commands("Taking keys out of service")
    ]
    assert "offline" in offline
    assert sessions.splitlines()[0].split()[0] == "shard"
    assert "online" in online
