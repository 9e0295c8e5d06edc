"""The whole emulator: it starts on its own, needs no set-up, and removes everything."""

import asyncio
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.config import Config

from proxy.emulator.cluster import Cluster
from proxy.emulator.lakebase import SHARDS_MAX, Lakebase


@pytest.mark.e2e
async def test_it_starts_its_own_clusters_and_removes_them() -> None:
    before = _directories()
    async with Lakebase(("alpha",)) as lakebase:
        assert lakebase["alpha"].cluster.execute("SELECT name FROM shard_identity") == "alpha"
        assert lakebase.ca_file.read_text().startswith("-----BEGIN CERTIFICATE-----")
    assert _directories() == before


def _directories() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob(f"lakebase-{os.getpid()}-*")}


async def test_clusters_that_run_already_are_left_running(
    clusters: Mapping[str, Cluster],
) -> None:
    async with Lakebase(clusters=clusters) as lakebase:
        names = [shard.name for shard in lakebase.shards]
    assert names == ["one", "two"]
    assert clusters["one"].execute("SELECT 1") == "1"


async def test_shards_have_hosts_names_and_clusters_of_their_own(lakebase: Lakebase) -> None:
    faces = [face for shard in lakebase.shards for face in (shard.endpoint, shard.instance)]
    assert len({face.host for face in faces}) == 4
    assert len({face.name for face in faces}) == 4
    assert len({shard.cluster.directory for shard in lakebase.shards}) == 2


async def test_a_stopped_cluster_is_a_compute_that_cannot_be_reached() -> None:
    cluster = Cluster("gone")
    with cluster:
        async with Lakebase(("gone",), clusters={"gone": cluster}) as lakebase:
            parameters: dict[str, Any] = lakebase.direct(lakebase["gone"].endpoint)
            cluster.stop()
            parameters |= {"sslmode": "require", "sslrootcert": ""}  # removed with the cluster
            with pytest.raises(psycopg.OperationalError, match="Couldn't connect to compute node"):
                await psycopg.AsyncConnection.connect(**parameters)


async def test_the_workspace_is_served_over_https_when_asked(
    lakebase: Lakebase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(lakebase.ca_file))
    name = lakebase["one"].endpoint.name
    async with lakebase.https() as https:
        assert https.url.startswith("https://")
        token = lakebase.personal_token

        def mint() -> Any:
            client = WorkspaceClient(config=Config(host=https.url, token=token))
            return client.postgres.generate_database_credential(name)

        assert (await asyncio.to_thread(mint)).token
    assert [minted.name for minted in lakebase.workspace.mints] == [name]


@pytest.mark.parametrize("count", [0, SHARDS_MAX + 1])
def test_the_number_of_shards_is_bounded(count: int) -> None:
    with pytest.raises(ValueError, match=f"1 to {SHARDS_MAX} shards, not {count}"):
        Lakebase([str(number) for number in range(count)])
