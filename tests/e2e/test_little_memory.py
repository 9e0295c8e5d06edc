"""When memory is short, a verb beside the proxy is killed, and not the proxy."""

from pathlib import Path

import pytest

from tests.e2e.conftest import StartProcess
from tests.support.proxy_process import started_process
from tests.support.running import eventually

pytestmark = pytest.mark.slow


def oom_score_adj(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@pytest.mark.parametrize("verb", ["check", "wait"])
async def test_a_verb_beside_the_proxy_is_killed_before_it(
    start_process: StartProcess, verb: str
) -> None:
    # In a container with 64 to 100 MiB `check` and `wait` had the kernel kill the proxy.
    proxy = await start_process()
    async with started_process(verb, "--admin.port", "1") as beside:
        await eventually(lambda: oom_score_adj(beside.pid) == 1000, "it gives way")
        assert oom_score_adj(proxy.pid) < 1000
