"""A worker's settings, and a reload that it alone refuses."""

import asyncio
import gc
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.config import Settings
from proxy.emulator.lakebase import Lakebase
from proxy.errors import ErrorKind, ProxyError
from proxy.server.app import App
from proxy.workers.connection_socket import connection_socket_pair
from proxy.workers.credential_service import CredentialService
from proxy.workers.rpc import RpcConnection
from proxy.workers.shared_counters import SharedCounters
from proxy.workers.worker import Worker, worker_settings
from tests.support.running import captured_log, proxy_settings
from tests.support.sharding import sharded

ENDPOINT = "projects/a/branches/b/endpoints/c"


def test_p3_bounds_of_a_target_are_divided_and_rounded_up_wherever_they_are_set() -> None:
    settings = Settings.model_validate(
        {
            "listen": {"workers": 4},
            "upstream": {"endpoint": ENDPOINT},
            "targets": {
                "own": {"host": "h", "connects_max": 5, "pool_idle_max": 1, "pool_size_max": 9},
                "taken": {"host": "h"},
            },
        }
    )
    assert settings.target("taken").connects_max == 50
    mine = worker_settings(settings)
    found = {name: mine.target(name).connects_max for name in mine.target_names()}
    assert found == {"upstream": 13, "own": 2, "taken": 13}
    own, taken = mine.target("own"), mine.target("taken")
    assert (own.pool_idle_max, own.pool_size_max) == (1, 3)
    assert (taken.pool_idle_max, taken.pool_size_max) == (3, 0)
    assert mine.target("own").host == "h"


def targets_of(reading: Mapping[str, Any]) -> set[str]:
    return {row["name"] for row in reading["targets"]}


async def test_a_reload_that_a_worker_cannot_use_is_refused_and_it_serves_on(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.csv"
    file.write_text("key,target\na,one\n")
    by_file: dict[str, object] = {"kind": "list", "key_type": "text", "mappings_file": str(file)}
    settings = proxy_settings(lakebase, **sharded(lakebase, by_file))
    content = json.loads(json.dumps(settings.model_dump(mode="json", exclude_unset=True)))
    supervisor, credential_service = App(settings), CredentialService()
    credential_service.register(1, supervisor.snapshot.upstreams)
    ours, theirs = socket.socketpair()
    connections, its_connections = connection_socket_pair()
    with captured_log(), connections, its_connections:
        rpc = await RpcConnection.open(ours, credential_service.methods)
        worker = asyncio.ensure_future(
            Worker(SharedCounters(1), 10, 1, its_connections).run(theirs)
        )
        await rpc.call("configure", generation=1, settings=content)
        file.unlink()  # since the supervisor has read it
        with pytest.raises(ProxyError) as caught:
            await rpc.call("configure", generation=2, settings=content)
        assert caught.value.kind is ErrorKind.INTERNAL
        assert "shard_maps.tenants.mappings_file" in caught.value.detail
        assert gc.isenabled()
        assert "third" not in targets_of(await rpc.call("read"))
        file.write_text("key,target\na,third\n")
        content["targets"]["third"] = content["targets"]["one"]
        await rpc.call("configure", generation=3, settings=content)
        assert "third" in targets_of(await rpc.call("read"))
        rpc.close()
        async with asyncio.timeout(5):
            await worker
    gc.unfreeze()
    await credential_service.close()
    await supervisor.workspaces.close()
