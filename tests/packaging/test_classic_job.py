"""The script of the example job-classic with a real proxy: the work is done, and the proxy ends.

Everything is the manifest's but the ports, which are free ones here.
"""

import re
from pathlib import Path

import pytest

from proxy.emulator.cluster import CLIENT_ID
from proxy.emulator.lakebase import Lakebase
from tests.packaging.manifests import documents, environment_of, pod_of
from tests.support.proxy_process import run_to_end, started_process
from tests.support.running import WAIT_SECONDS_MAX, proxy_values, psql_path, toml
from tests.support.tools import need

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.mark.parametrize(("statement", "code"), [("SELECT current_user", 0), ("SELECT 1/0", 1)])
async def test_the_work_ends_the_sidecar_however_it_ended(
    statement: str, code: int, lakebase: Lakebase, unused_tcp_port: int, tmp_path: Path
) -> None:
    need("the script of job-classic", "sh", "wget")
    work = pod_of(documents("job-classic"))["containers"][0]
    config = tmp_path / "proxy.toml"
    sections = {"admin": {"enabled": True, "quit": True, "port": unused_tcp_port}}
    config.write_text(toml(proxy_values(lakebase, sections)))
    async with started_process("run", "--config", str(config)) as proxy:
        await proxy.serving()
        script = re.sub(r"127\.0\.0\.1:9090", f"127.0.0.1:{unused_tcp_port}", work["command"][-1])
        environment = environment_of(work) | {
            "PGPORT": str(proxy.listen_port),
            "PATH": f"{psql_path().parent}:/usr/bin:/bin",
        }
        command = [*work["command"][:-1], script.replace("SELECT current_user", statement)]
        ended, out, err = await run_to_end(command[0], *command[1:], environment=environment)
        assert (ended != 0) == (code != 0), err
        assert (CLIENT_ID in out) == (code == 0)
        assert await proxy.ended(WAIT_SECONDS_MAX) == 0
