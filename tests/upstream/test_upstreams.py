"""Ways across a reload: which are taken over, and which begin anew."""

import os
from pathlib import Path

import pytest
import trustme

from proxy.config import ConfigurationError, Settings
from proxy.server.app import build_metrics
from proxy.transport import tls
from proxy.upstream.upstreams import LocalWorkspaceRegistry, Upstreams
from tests.support.compiled import need_compiled

ENDPOINT = "projects/p/branches/b/endpoints/"


def settings(connects_max: int) -> Settings:
    targets = {
        "one": {"endpoint": ENDPOINT + "one"},
        "two": {"endpoint": ENDPOINT + "two", "connects_max": connects_max},
    }
    return Settings.model_validate({"targets": targets})


async def test_a_way_that_is_configured_as_before_keeps_its_dialer_and_so_its_places() -> None:
    # With a new dialer each reload would allow another `connects_max` sessions to be opened.
    accounts = LocalWorkspaceRegistry(build_metrics(), version="1")
    try:
        before = Upstreams(settings(5), accounts, lambda *_: None)
        after = Upstreams(settings(6), accounts, lambda *_: None, before)
        assert after["one"] is before["one"]
        assert after["two"].dialer is not before["two"].dialer
    finally:
        await accounts.close()


async def test_a_certificate_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    # It is read on the event loop: a reload would have stopped every session.
    os.mkfifo(tmp_path / "ca.pem")
    upstream = {"endpoint": ENDPOINT + "one", "ssl_root_cert": str(tmp_path / "ca.pem")}
    accounts = LocalWorkspaceRegistry(build_metrics(), version="1")
    with pytest.raises(ConfigurationError, match="it is not a regular file"):
        Upstreams(Settings.model_validate({"upstream": upstream}), accounts, lambda *_: None)
    await accounts.close()


async def test_the_compiled_context_is_made_with_the_way_and_not_by_its_first_session(
    tmp_path: Path,
) -> None:
    # Python's was, and the compiled one at the first dial: reading the system's authorities, tens
    # of milliseconds, stopped every session, and what only the compiled one refuses showed late.
    need_compiled("when its context is made")
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    upstream = {"endpoint": ENDPOINT + "one", "ssl_root_cert": str(path)}
    accounts = LocalWorkspaceRegistry(build_metrics(), version="1")
    Upstreams(Settings.model_validate({"upstream": upstream}), accounts, lambda *_: None)
    made = tls._compiled_context.cache_info().misses
    tls.client_context("verify-full", str(path), accelerated=True)
    assert tls._compiled_context.cache_info().misses == made
    await accounts.close()
