"""A person's own login as docs/laptop.md writes it, with a CLI that is the emulator's.

The program `databricks` is a script that writes the profile and prints the token that the real one
would: what is tested is that the SDK finds both, and what a client sees.
"""

import asyncio
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy.emulator.cluster import PERSON
from proxy.emulator.lakebase import Lakebase
from tests.packaging.manifests import ROOT
from tests.support.proxy_process import ProxyProcess, run_to_end, started_process
from tests.support.running import psql_path

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DOCUMENT = (ROOT / "docs" / "laptop.md").read_text()
PERSONS_TOKEN = "persons-workspace-token-not-real"
# The back-off after a login that failed, on a machine that is busy with something else.
LOGIN_SECONDS_MAX = 60
PROGRAM = """\
#!/bin/sh
case "$1 $2" in
"auth login")
    printf '[PROFILE]\\nhost = %s\\nauth_type = databricks-cli\\n' "$4" > "$HOME/.databrickscfg"
    touch "$HOME/login" ;;
"auth token")
    [ -f "$HOME/login" ] || { echo "Error: the refresh token is invalid" >&2; exit 1; }
    cat "$HOME/token.json" ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home directory, with the program in its folder `bin`."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "databricks"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    token = {"token_type": "Bearer", "expiry": "2099-01-01T00:00:00Z"}
    (tmp_path / "token.json").write_text(json.dumps({**token, "access_token": PERSONS_TOKEN}))
    return tmp_path


def commands(lakebase: Lakebase) -> list[list[str]]:
    """Return the commands of the chapter in words, with the emulator's names."""
    chapter = DOCUMENT.partition("## With your own login\n")[2].partition("\n## ")[0]
    names = {
        "https://WORKSPACE.cloud.databricks.com": lakebase.workspace_url,
        "projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT": lakebase.shards[0].endpoint.name,
    }
    for name, value in names.items():
        chapter = chapter.replace(name, value)
    return [shlex.split(line) for line in re.findall(r"^\$ (.*)$", chapter, re.MULTILINE)]


async def psql(words: list[str], proxy: ProxyProcess) -> tuple[int, str, str]:
    """Ask who is logged in, by the document's command."""
    assert words[0] == "psql"
    where = f"{words[1]} port={proxy.listen_port}"
    return await run_to_end(psql_path(), where, "-Atc", "SELECT current_user")


async def test_a_person_logs_in_with_the_login_of_the_cli(home: Path, lakebase: Lakebase) -> None:
    lakebase.workspace.api.personal_tokens[PERSONS_TOKEN] = PERSON
    login, *exports, run, ask = commands(lakebase)
    variables = dict(words[1].split("=", 1) for words in exports if words[0] == "export")
    assert len(variables) == len(exports)
    path = f"{home / 'bin'}:{Path(shutil.which('sh') or '/bin/sh').parent}"
    # The SDK looks there unless it is told another file, as tests are.
    profiles = str(home / ".databrickscfg")
    person = {"HOME": str(home), "PATH": path, "DATABRICKS_CONFIG_FILE": profiles}
    code, _, err = await run_to_end(*login, environment=person)
    assert code == 0, err
    emulated = {
        "LAKEBASE_PROXY_LISTEN__PORT": "0",
        "LAKEBASE_PROXY_ADMIN__PORT": "0",
        "LAKEBASE_PROXY_LOG__FORMAT": "json",
        "LAKEBASE_PROXY_UPSTREAM__HOSTADDR": lakebase.host_address,
        "LAKEBASE_PROXY_UPSTREAM__PORT": str(lakebase.port),
        "LAKEBASE_PROXY_UPSTREAM__SSL_ROOT_CERT": str(lakebase.ca_file),
    }
    environment: Mapping[str, str] = {**person, **variables, **emulated}
    assert run[0] == "lakebase-auth-proxy"
    (home / "login").unlink()  # it has expired
    async with started_process(*run[1:], environment=environment) as proxy:
        await proxy.serving()
        code, _, err = await psql(ask, proxy)
        assert code != 0
        assert "reason=workspace_login_failed" in err
        assert "databricks auth login" in err
        (home / "login").touch()
        async with asyncio.timeout(LOGIN_SECONDS_MAX):
            while (answer := await psql(ask, proxy))[0] != 0:
                assert "reason=workspace_login_failed" in answer[2]  # the back-off
        assert answer[1].strip() == PERSON
