"""Fixtures that every test may use: the event loop, the clusters, a Lakebase.

The clusters run for the whole session and keep what tests write into them: take names of your
own, or `scratch_database`. Everything in front of them is new for each test.
"""

import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import hypothesis
import pytest
import pytest_asyncio
import uvloop

from proxy.emulator.cluster import CLIENT_ID, Cluster, quoted, start_together, stop_together
from proxy.emulator.lakebase import SHARDS, Lakebase

# Nothing that a test starts may show a secret.
pytest_plugins = (
    "tests.support.secret_canaries",
    "tests.support.closed_checkout",
    "tests.support.catalogue",
)

hypothesis.settings.register_profile("fast", deadline=None)
hypothesis.settings.register_profile(
    "deep", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20000"))
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], Any]]:
    """Run every asynchronous test on the loop that the product uses."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a real PostgreSQL: they are those that ask for it."""
    for item in items:
        if "clusters" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a test that configures logging leaves: a handler on a stream that is closed."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def clusters() -> Iterator[Mapping[str, Cluster]]:
    """Return running clusters by shard name, shared by all tests."""
    version = int(os.environ.get("TEST_SHARDS_VERSION", "16"))
    settings = {"max_prepared_transactions": "5"}
    started = [Cluster(name, version=version, settings=settings) for name in SHARDS]
    start_together(started)
    yield {cluster.shard: cluster for cluster in started}
    stop_together(started)


@pytest_asyncio.fixture
async def lakebase(clusters: Mapping[str, Cluster]) -> AsyncIterator[Lakebase]:
    """Return a new workspace and a new gateway in front of the session's clusters."""
    async with Lakebase(clusters=clusters) as started:
        yield started


@pytest.fixture
def scratch_database(clusters: Mapping[str, Cluster]) -> Iterator[str]:
    """Return the name of a database that is empty on every cluster and gone after the test."""
    name = f"scratch_{uuid.uuid4().hex[:12]}"
    for cluster in clusters.values():
        cluster.execute(f"CREATE DATABASE {name} OWNER {quoted(CLIENT_ID)}")
    yield name
    for cluster in clusters.values():
        cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")
