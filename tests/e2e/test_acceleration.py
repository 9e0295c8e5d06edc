"""Which sessions the compiled relay serves: `upstream.accelerated`, and what clients connect by.

For: the seams, where some sessions of a process have it and others have not. Not for: what a lane
does (`tests/native`), or what operators are told (`test_app`).
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from tests.e2e.conftest import StartProxy
from tests.support.compiled import need_compiled
from tests.support.running import eventually, libpq, proxy_settings
from tests.support.sharding import range_map, target

LANES_OF_A_SESSION = 2
# More than any buffer on the way, and than one read of a lane's.
LARGE = "SELECT repeat('x', 4000000)"


@pytest.fixture(autouse=True)
def compiled() -> None:
    need_compiled("which sessions get the compiled relay")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: a socket's path has a bound of 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="lap-"))
    yield made
    shutil.rmtree(made)


def lanes(app: App) -> int:
    assert app.lanes is not None
    return len(app.lanes)


def two_targets(lakebase: Lakebase, *, accelerated: tuple[bool, bool]) -> Mapping[str, Any]:
    """Return sections with a target for each shard, reached by its name as a database."""
    shards = lakebase.shards[:2]
    names = [shard.name for shard in shards]
    made = {
        shard.name: target(lakebase, shard.endpoint, accelerated=wanted)
        for shard, wanted in zip(shards, accelerated, strict=True)
    }
    return {
        "targets": made,
        "shard_maps": {"tenants": range_map(names)},
        "routing": {"shard_map": "tenants"},
    }


async def connected(app: App, **more: Any) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(**libpq(app, **more), autocommit=True)


async def use(connection: psycopg.AsyncConnection[Any]) -> None:
    """Carry much in each direction, and small messages after it."""
    row = await (await connection.execute(LARGE)).fetchone()
    assert row is not None
    assert len(row[0]) == 4_000_000
    row = await (await connection.execute("SELECT length(%s)", [row[0]])).fetchone()
    assert row == (4_000_000,)
    assert await (await connection.execute("SELECT 1")).fetchone() == (1,)


async def test_targets_with_and_without_it_are_served_side_by_side(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    app = await start_proxy(**two_targets(lakebase, accelerated=(True, False)))
    assert app.metrics.value("build_info", acceleration="partly") == 1
    async with await connected(app, dbname="app@7") as fast:
        await eventually(lambda: lanes(app) == LANES_OF_A_SESSION, "its lanes")
        async with await connected(app, dbname="app@1500") as plain:
            await use(plain)
            assert lanes(app) == LANES_OF_A_SESSION
            await use(fast)
    await eventually(lambda: lanes(app) == 0, "all closed")


async def test_a_reload_counts_for_new_sessions_and_running_ones_keep_what_they_have(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    app = await start_proxy(**two_targets(lakebase, accelerated=(True, True)))
    async with await connected(app, dbname="app@7") as before:
        await use(before)
        turned = proxy_settings(lakebase, **two_targets(lakebase, accelerated=(False, False)))
        app.reload(turned)
        async with await connected(app, dbname="app@7") as since:
            await use(since)
            assert lanes(app) == LANES_OF_A_SESSION
            await use(before)
            app.reload(proxy_settings(lakebase, **two_targets(lakebase, accelerated=(True, True))))
            async with await connected(app, dbname="app@7") as again:
                await use(again)
                await use(since)
                assert lanes(app) == 2 * LANES_OF_A_SESSION
    await eventually(lambda: lanes(app) == 0, "all closed")


async def test_a_client_with_tls_is_relayed_in_python_over_the_compiled_upstream(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    issued = trustme.CA().issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(chain), append=number > 0)
    issued.private_key_pem.write_to_path(str(key))
    app = await start_proxy(listen={"tls_certificate": str(chain), "tls_key": str(key)})
    async with await connected(app, sslmode="require") as encrypted:
        await use(encrypted)
        assert lanes(app) == 0
        async with await connected(app, sslmode="disable") as plain:
            await use(plain)
            assert lanes(app) == LANES_OF_A_SESSION
            await use(encrypted)


async def test_a_client_on_the_unix_socket_has_lanes(
    start_proxy: StartProxy, directory: Path
) -> None:
    app = await start_proxy(listen={"unix_socket_directory": str(directory)})
    async with await connected(app, host=str(directory)) as connection:
        await use(connection)
        assert lanes(app) == LANES_OF_A_SESSION


async def test_an_idle_session_with_lanes_is_ended_in_time(start_proxy: StartProxy) -> None:
    app = await start_proxy(listen={"idle_timeout_seconds": 1})
    async with await connected(app) as connection:
        await use(connection)
        assert lanes(app) == LANES_OF_A_SESSION
        await eventually(lambda: lanes(app) == 0, "ended")
        with pytest.raises(psycopg.errors.IdleSessionTimeout):
            await connection.execute("SELECT 1")


@pytest.mark.parametrize("accelerated", [True, False])
async def test_authorities_are_read_anew_with_it_and_without(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path, accelerated: bool
) -> None:
    path = tmp_path / "ca.pem"
    shutil.copyfile(lakebase.ca_file, path)
    app = await start_proxy(upstream={"ssl_root_cert": str(path), "accelerated": accelerated})
    async with await connected(app) as before:
        trustme.CA().cert_pem.write_to_path(str(path))
        with pytest.raises(psycopg.OperationalError, match="reason=upstream_certificate"):
            await connected(app)
        path.unlink()
        with pytest.raises(psycopg.OperationalError, match="No such file"):
            await connected(app)
        shutil.copyfile(lakebase.ca_file, path)
        async with await connected(app) as after:
            await use(after)
        await use(before)


@pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full"])
async def test_each_sslmode_has_lanes(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path, sslmode: str
) -> None:
    path = tmp_path / "ca.pem"
    shutil.copyfile(lakebase.ca_file, path)
    app = await start_proxy(upstream={"ssl_root_cert": str(path), "sslmode": sslmode})
    async with await connected(app) as connection:
        await use(connection)
        assert lanes(app) == LANES_OF_A_SESSION
