"""A proxy of a catalogue's map as a process, and its sessions, for benchmarks on the emulator."""

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.catalogue import Stores
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import Listening
from tests.support.sidecars import connect

_CONNECT_SECONDS_MAX: Final = 120.0


@asynccontextmanager
async def serving_proxy(
    stores: Stores, **sections: Mapping[str, object]
) -> AsyncIterator[ProxyProcess]:
    """Yield a proxy that serves; keyword arguments are sections of its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        admin = {"enabled": True, "port": 0}
        file = stores.file(Path(folder), stores.roles.session, admin=admin, **sections)
        async with started_process("run", "--config", str(file)) as proxy:
            await proxy.serving()
            yield proxy


async def open_session(proxy: Listening, key: int) -> Any:
    """Open a session for a key. Many at once are waited for."""
    return await connect(proxy, key, _CONNECT_SECONDS_MAX)
