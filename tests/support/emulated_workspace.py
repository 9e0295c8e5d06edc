"""Fixtures: a workspace without clusters, and an environment that the SDK finds nothing in."""

import os
import ssl
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import trustme

from proxy.emulator.cluster import CLIENT_ID, Cluster
from proxy.emulator.endpoints import Dialect, Endpoint
from proxy.emulator.lakebase import CLIENT_SECRET, PERSONAL_TOKEN
from proxy.emulator.workspace import Workspace
from tests.support.dialing import HOST

ENDPOINT = "projects/p/branches/b/endpoints/primary"


@pytest.fixture(autouse=True)
def no_databricks_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the SDK would discover on the machine that runs the tests."""
    for name in list(os.environ):
        if name.startswith("DATABRICKS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", os.devnull)


@pytest.fixture
def endpoint() -> Endpoint:
    """Return an endpoint whose cluster does not run; only the API knows it."""
    return Endpoint(ENDPOINT, "ep-quiet-forest-00000001", Dialect.AUTOSCALING, Cluster("none"))


@pytest_asyncio.fixture
async def api(endpoint: Endpoint) -> AsyncIterator[Workspace]:
    """Return the emulator's workspace API alone."""
    async with Workspace([endpoint], {CLIENT_ID: CLIENT_SECRET}) as started:
        started.api.personal_tokens[PERSONAL_TOKEN] = CLIENT_ID
        yield started


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Return an authority that signs the certificate of scripted servers."""
    return trustme.CA()


@pytest.fixture(scope="session")
def context(authority: trustme.CA) -> ssl.SSLContext:
    """Return what a scripted server shakes hands with."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(made)
    return made


@pytest.fixture(scope="session")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the file with that authority, as `ssl_root_cert` names it."""
    path = tmp_path_factory.mktemp("script") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)
