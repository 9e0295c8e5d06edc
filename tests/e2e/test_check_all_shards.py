"""`check --all-shards` as a process: the whole way to every target, target by target."""

import json
import sys
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from tests.support.proxy_process import run_to_end
from tests.support.running import proxy_values, toml
from tests.support.sharding import sharded

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


async def checked(lakebase: Lakebase, directory: Path, *flags: str) -> tuple[int, str]:
    file = directory / "proxy.toml"
    nowhere = {"endpoint": "", "hostaddr": ""}
    file.write_text(toml(proxy_values(lakebase, {**sharded(lakebase), "upstream": nowhere})))
    command = (sys.executable, "-m", "proxy", "check", "--all-shards", "--config", str(file))
    code, out, err = await run_to_end(*command, *flags)
    assert err == ""
    return code, out


async def test_every_shard_is_walked_to_and_named(lakebase: Lakebase, tmp_path: Path) -> None:
    code, out = await checked(lakebase, tmp_path)
    assert code == 0, out
    assert [line for line in out.splitlines() if line.startswith("target ")] == [
        *("target one", "target two"),
    ]
    assert {record.sni for record in lakebase.gateway.sessions} == {
        shard.endpoint.host for shard in lakebase.shards
    }


@pytest.mark.parametrize("user", ["", "*"])
async def test_a_user_who_is_called_like_a_target_does_not_confuse_it(
    lakebase: Lakebase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    """A database that is named like the user counts as none, also where it is an alias."""
    monkeypatch.setenv("LOGNAME", "two")
    code, out = await checked(lakebase, tmp_path, f"--upstream.user={user}")
    assert code == 0, out
    # Each target is dialled twice: by the steps, and by the query.
    shards = [record.sni for record in lakebase.gateway.sessions]
    assert shards == [shard.endpoint.host for shard in lakebase.shards for _ in range(2)]


async def test_a_shard_that_fails_is_told_apart_from_one_that_works(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    lakebase["two"].endpoint.disabled = True
    code, out = await checked(lakebase, tmp_path, "--json")
    said = json.loads(out)
    assert (code, said["ok"]) == (1, False)
    failed = {step["target"] for step in said["steps"] if not step["ok"]}
    assert failed == {"two"}
    assert {step["target"] for step in said["steps"]} == {"one", "two"}
