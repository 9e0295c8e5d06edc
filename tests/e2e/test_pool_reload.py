"""A reload that fails leaves no hold on a pool."""

from pathlib import Path

import pytest

from proxy.config import ConfigurationError
from proxy.emulator.lakebase import Lakebase
from tests.e2e.conftest import StartProxy
from tests.support.pool_clients import pooling, settled, visit
from tests.support.running import eventually, proxy_settings


async def test_p44_a_reload_that_failed_does_not_keep_the_next_one_from_closing_a_pool(
    start_proxy: StartProxy, lakebase: Lakebase, tmp_path: Path
) -> None:
    # The upstreams of the configuration that was refused held the pool for ever.
    proxy = await start_proxy(**pooling(pool_size_max=3))
    await visit(proxy)
    await settled(proxy, idle=1)
    (tmp_path / "broken.pem").write_text("broken")
    pair = {key: str(tmp_path / "broken.pem") for key in ("tls_certificate", "tls_key")}
    for sections in (pooling(pool_size_max=3), pooling(pool_size_max=4)):
        with pytest.raises(ConfigurationError):
            proxy.reload(proxy_settings(lakebase, listen=pair, **sections))
    (row,) = proxy.metrics.pools.rows()
    assert row.present.size_max == 3
    proxy.reload(proxy_settings(lakebase))
    await eventually(lambda: lakebase.gateway.open_sessions == 0, "nothing is kept")
