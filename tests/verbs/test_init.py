"""`init` against the emulator: what it asks, what it prints, and that `check` accepts it."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from proxy.emulator.api import Call
from proxy.emulator.endpoints import Endpoint
from proxy.emulator.faults import HANG
from proxy.emulator.lakebase import Lakebase
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from tests.support.proxy_process import ROOT, run_to_end
from tests.support.running import without_own_account

SECONDS_MAX = 60

pytestmark = pytest.mark.slow


def login(lakebase: Lakebase) -> dict[str, str]:
    """Return the environment of a login that the SDK finds by itself."""
    return {
        "PYTHONPATH": str(ROOT),
        "DATABRICKS_HOST": lakebase.workspace_url,
        "DATABRICKS_CLIENT_ID": lakebase.client_id,
        "DATABRICKS_CLIENT_SECRET": lakebase.client_secret,
    }


async def init(lakebase: Lakebase, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run `init` without a terminal."""
    command = ("-B", "-m", "proxy", "init", *arguments)
    found = await run_to_end(
        sys.executable, *command, environment={**login(lakebase), **environment}
    )
    assert lakebase.client_secret not in found[1] + found[2]
    assert "Traceback" not in found[2]
    return found


def chosen(lakebase: Lakebase) -> tuple[Endpoint, list[str]]:
    """Return an endpoint of the emulator, and the flags that choose it."""
    endpoint = lakebase.shards[0].endpoint
    _, project, _, branch, _, _ = endpoint.name.split("/")
    return endpoint, ["--project", project, "--branch", branch]


async def test_check_accepts_what_init_prints_for_the_environment(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    endpoint, flags = chosen(lakebase)
    code, out, err = await init(lakebase, *flags)
    assert (code, endpoint.name in err) == (EXIT_OK, True)
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    assert lines == [
        f"LAKEBASE_PROXY_WORKSPACE__HOST={lakebase.workspace_url}",
        f"LAKEBASE_PROXY_UPSTREAM__ENDPOINT={endpoint.name}",
        "LAKEBASE_PROXY_UPSTREAM__DATABASE=databricks_postgres",
    ]
    await accepted(lakebase, tmp_path, **dict(line.split("=", 1) for line in lines))


async def test_check_accepts_the_toml_that_init_prints(lakebase: Lakebase, tmp_path: Path) -> None:
    _, flags = chosen(lakebase)
    code, out, _ = await init(lakebase, *flags, "--toml")
    assert code == EXIT_OK
    (config := tmp_path / "proxy.toml").write_text(out)
    await accepted(lakebase, tmp_path, LAKEBASE_PROXY_CONFIG=str(config))


async def accepted(lakebase: Lakebase, tmp_path: Path, **printed: str) -> None:
    """Run `check` with what was printed, and with where the emulator listens."""
    local = {
        "LAKEBASE_PROXY_UPSTREAM__HOSTADDR": lakebase.host_address,
        "LAKEBASE_PROXY_UPSTREAM__PORT": str(lakebase.port),
        "LAKEBASE_PROXY_UPSTREAM__SSL_ROOT_CERT": str(lakebase.ca_file),
        "LAKEBASE_PROXY_LISTEN__PORT": "0",
    }
    environment = {**login(lakebase), **local, **printed}
    command = ("-B", "-m", "proxy", "check", "--json")
    code, out, err = await run_to_end(sys.executable, *command, environment=environment)
    assert (code, json.loads(out)["ok"], err) == (EXIT_OK, True, "")


async def test_the_sql_alone_makes_the_role_with_its_grants(lakebase: Lakebase) -> None:
    endpoint, flags = chosen(lakebase)
    code, out, _ = await init(lakebase, *flags, "--sql", "--role", "o'hara@example.com")
    assert code == EXIT_OK
    statements = out.splitlines()
    assert statements[:2] == [
        "CREATE EXTENSION IF NOT EXISTS databricks_auth;",
        "SELECT databricks_create_role('o''hara@example.com', 'USER');",
    ]
    endpoint.cluster.execute(out, database="databricks_postgres")
    granted = endpoint.cluster.execute(
        "SELECT has_schema_privilege('o''hara@example.com', 'public', 'CREATE')",
        database="databricks_postgres",
    )
    assert "t" in str(granted)
    endpoint.cluster.execute(
        'DROP OWNED BY "o\'hara@example.com"; DROP ROLE "o\'hara@example.com"',
        database="databricks_postgres",
    )


async def test_without_a_terminal_it_says_what_there_is_to_choose(lakebase: Lakebase) -> None:
    # Without any standard input it ended with a traceback.
    closed = ("sh", "-c", '"$0" -B -m proxy init <&-', sys.executable)
    code, out, err = await run_to_end(*closed, environment=login(lakebase))
    assert "Traceback" not in err
    assert (code, out) == (EXIT_FAILURE, "")
    for shard in lakebase.shards:
        assert "/".join(shard.endpoint.name.split("/")[:2]) in err
    assert "set --" in err


async def test_lists_are_read_page_after_page(
    lakebase: Lakebase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lakebase.workspace.api, "page_size_max", 1)
    before = lakebase.workspace.calls[Call.RESOURCE]
    endpoint, (_, project, *branch) = chosen(lakebase)
    # As the list shows the project, and the argument that is its id.
    code, out, _ = await init(lakebase, "--project", f"projects/{project}", *branch)
    assert (code, endpoint.name in out) == (EXIT_OK, True)
    assert lakebase.workspace.calls[Call.RESOURCE] - before > 3


async def test_what_is_not_there_or_contradicts_is_refused(lakebase: Lakebase) -> None:
    code, out, err = await init(lakebase, "--project", "nowhere")
    assert (code, out) == (EXIT_FAILURE, "")
    assert "there is no projects/nowhere" in err
    for contradiction in (("--toml", "--sql"), ("--upstream.instance", "i", "--branch", "b")):
        code, out, err = await init(lakebase, *contradiction)
        assert (code, out) == (EXIT_USAGE, "")


async def test_what_is_set_is_printed_and_not_another_workspaces_profile(
    lakebase: Lakebase,
) -> None:
    """The profile of the environment was printed, and the instance was not looked at."""
    workspace = {
        "LAKEBASE_PROXY_WORKSPACE__HOST": lakebase.workspace_url,
        "LAKEBASE_PROXY_WORKSPACE__CLIENT_ID": lakebase.client_id,
        "LAKEBASE_PROXY_WORKSPACE__CLIENT_SECRET": lakebase.client_secret,
        "DATABRICKS_CONFIG_PROFILE": "elsewhere",
    }
    instance = lakebase.shards[0].instance.name
    code, out, _ = await init(lakebase, "--upstream.instance", instance, **workspace)
    assert (code, out.splitlines()[:2]) == (
        EXIT_OK,
        [
            f"LAKEBASE_PROXY_WORKSPACE__HOST={lakebase.workspace_url}",
            f"LAKEBASE_PROXY_UPSTREAM__INSTANCE={instance}",
        ],
    )


async def test_a_refused_login_says_what_the_hint_refers_to(lakebase: Lakebase) -> None:
    profile = {"DATABRICKS_CONFIG_PROFILE": "mine", "DATABRICKS_CONFIG_FILE": "/nowhere/profiles"}
    code, out, err = await init(lakebase, **profile)
    assert (code, out) == (EXIT_FAILURE, "")
    assert "/nowhere/profiles: the file with the profile [mine] does not exist" in err


async def test_a_list_that_hangs_ends(lakebase: Lakebase) -> None:
    lakebase.workspace.fail(Call.RESOURCE, HANG)
    try:
        code, out, err = await init(lakebase, "--credentials.mint_timeout_seconds", "2")
    finally:
        lakebase.workspace.clear_faults()
    assert (code, out) == (EXIT_FAILURE, "")
    assert "api_unreachable" in err


async def test_on_a_terminal_it_asks_on_standard_error(lakebase: Lakebase) -> None:
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-B", "-m", "proxy", "init"),
        stdin=theirs,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**without_own_account(os.environ), **login(lakebase)},
    )
    try:
        os.close(theirs)
        os.write(ours, b"none\n2\n")
        async with asyncio.timeout(SECONDS_MAX):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
    assert process.returncode == EXIT_OK
    assert f"LAKEBASE_PROXY_UPSTREAM__ENDPOINT={lakebase.shards[1].endpoint.name}\n" in out.decode()
    assert "Which of the projects? [1] a number from 1 to" in err.decode()
    assert "read-write, ACTIVE" in err.decode()
    assert "Which" not in out.decode()
