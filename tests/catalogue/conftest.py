"""Fixtures of the catalogue's tests: a map on two shards, to be operated on or followed."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.support.catalogue import Stores
from tests.support.followed import FollowedCatalogue, filled
from tests.support.operating import Operating


@pytest_asyncio.fixture
async def operating(stores: Stores) -> AsyncIterator[Operating]:
    """Return a map of ranges on two shards, without mappings."""
    found = Operating(stores)
    await found.set_up()
    yield found
    await found.close()


@pytest_asyncio.fixture
async def catalogue(stores: Stores) -> AsyncIterator[FollowedCatalogue]:
    """Return a catalogue with a map of two shards and two mappings."""
    async with filled(stores) as found:
        yield found
