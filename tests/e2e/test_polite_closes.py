"""A polite close by any client is a completed session; `make closes` does it a thousand times."""

from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from tests.e2e.conftest import StartProcess
from tests.soak.polite_closes import CLIENTS, COMPLETED, Ends, close_politely
from tests.support.languages import need_driver

CLOSES = 20
PROCESSES = 2
# It begins a transaction by itself, and closes without an end of it: no other client may get that.
LEAVES_TRANSACTIONS = ("psycopg",)

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


# Without a pool of the proxy's it is a check of every client in tests/clients, but for psql.
@pytest.mark.parametrize(
    ("name", "mode"), [("psql", "off"), *((name, "session") for name in CLIENTS)]
)
async def test_a_polite_close_is_a_completed_session(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path, name: str, mode: str
) -> None:
    # Half of all polite closes, and each one of asyncpg, were counted as lost: the shipped alert
    # fired on healthy applications.
    client = CLIENTS[name]
    await need_driver(f"polite closes by {name}", client)
    proxy = await start_process(admin={"enabled": True, "port": 0}, upstream={"pool": mode})
    closes = await close_politely(client, proxy, tmp_path, CLOSES, PROCESSES)
    assert closes.ends == Ends({COMPLETED: CLOSES})
    logins = lakebase.gateway.logins.total()
    # A busy machine dials for a client that comes before the reset is over.
    keeps = mode == "session" and name not in LEAVES_TRANSACTIONS
    assert (logins <= CLOSES / 2) if keeps else logins >= CLOSES
