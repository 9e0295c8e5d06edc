"""Two thousand sessions over a thousand keys; `make routes` does it with a hundred thousand."""

from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from tests.soak.routing import KEYS, run

SESSIONS = 2 * KEYS

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


async def test_s15_every_session_of_two_thousand_is_on_the_shard_of_its_key(
    lakebase: Lakebase, tmp_path: Path
) -> None:
    outcome = await run(lakebase, tmp_path, SESSIONS, KEYS)
    assert outcome.wrong == []
    assert outcome.shards.total() == SESSIONS
    assert len(outcome.keys) == KEYS
    assert min(outcome.shards["one"], outcome.shards["two"]) > SESSIONS // 4
    assert outcome.mints == 1 + int(outcome.seconds > 30)  # fresh for a minute, then the next
