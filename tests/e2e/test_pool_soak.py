"""A little of `make pooling`, with another seed each time."""

import asyncio
import faulthandler
import random
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from tests.soak.pooling import run

SECONDS = 20.0
CLIENTS = 60
# On a busy machine it takes longer until everything has happened once.
ALL_SECONDS_MAX = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


async def test_every_client_finds_its_session_as_new(lakebase: Lakebase, tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # its bound is for tests that wait
    async with asyncio.timeout(ALL_SECONDS_MAX):
        outcome = await run(lakebase, tmp_path, SECONDS, random.randrange(2**32), CLIENTS)
    assert outcome.wrong == [], str(outcome)  # with the seed; it has done everything as well
