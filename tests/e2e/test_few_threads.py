"""A machine without threads: clients are told so, and the proxy goes on."""

import signal
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.exit_codes import EXIT_OK
from tests.support.client import plain_client, startup
from tests.support.proxy_process import started_process
from tests.support.running import proxy_values, toml

pytestmark = pytest.mark.slow

# No thread has room for such a stack, so that none starts after the log's.
NO_THREADS = """
import sys, threading
start = threading.Thread.start
def start_the_last(thread):
    start(thread)
    threading.stack_size(1 << 46)
threading.Thread.start = start_the_last
from proxy.__main__ import main
sys.exit(main())
"""


async def test_without_threads_clients_are_told_and_the_proxy_goes_on(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    # The proxy ended with a traceback, or the client was told internal_error.
    config = tmp_path / "proxy.toml"
    config.write_text(toml(proxy_values(lakebase, {})))
    program = ("-c", NO_THREADS)
    async with started_process("run", "--config", str(config), program=program) as proxy:
        await proxy.serving()
        for _ in range(2):
            async with plain_client(proxy) as client:
                await client.send(startup())
                error = await client.error()
                assert (error.sqlstate, (error.text(b"D") or "").split()[0]) == (
                    "57P03",
                    "reason=out_of_resources",
                )
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == EXIT_OK
        assert "Traceback" not in proxy.err
