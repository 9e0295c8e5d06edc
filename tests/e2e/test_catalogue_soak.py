"""A little of `make soak`, with another seed each time."""

import asyncio
import faulthandler
import random
from pathlib import Path

import pytest

from tests.soak.moves import run
from tests.support.catalogue import Stores

SECONDS = 20.0
# On a busy machine it takes longer until everything has happened once, and to start and to judge.
ALL_SECONDS_MAX = 600.0

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


async def test_s30_no_key_is_on_two_shards_and_no_row_is_lost(
    stores: Stores, tmp_path: Path
) -> None:
    faulthandler.cancel_dump_traceback_later()  # its bound is for tests that wait
    async with asyncio.timeout(ALL_SECONDS_MAX):
        outcome = await run(stores, tmp_path, SECONDS, random.randrange(2**32))
    assert outcome.wrong == [], str(outcome)  # with the seed; it has done everything as well
