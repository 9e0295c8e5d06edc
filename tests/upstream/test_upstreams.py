"""Upstreams across a reload: which are kept, which are new, and when the old ones are closed."""

import os
from pathlib import Path

import pytest
import trustme

from proxy.config import ConfigurationError, Settings
from proxy.server.metric_labels import build_metrics
from proxy.transport import tls
from proxy.upstream.upstreams import Upstreams
from proxy.workspace.registry import LocalWorkspaceRegistry
from tests.support.compiled import need_compiled

ENDPOINT = "projects/p/branches/b/endpoints/"


def settings(connects_max: int) -> Settings:
    targets = {
        "one": {"endpoint": ENDPOINT + "one"},
        "two": {"endpoint": ENDPOINT + "two", "connects_max": connects_max},
    }
    return Settings.model_validate({"targets": targets})


async def test_an_upstream_that_is_configured_as_before_keeps_its_dialer() -> None:
    # With a new dialer each reload would allow another `connects_max` sessions to be opened.
    registry = LocalWorkspaceRegistry(build_metrics(), version="1")
    try:
        before = Upstreams(settings(5), registry, lambda *_: None)
        after = Upstreams(settings(6), registry, lambda *_: None, before)
        assert after["one"] is before["one"]
        assert after["two"].dialer is not before["two"].dialer
    finally:
        await registry.close()


def of_instances(*names: str) -> Settings:
    """Return settings with a Provisioned instance for each target: each has its own account."""
    targets = {name: {"instance": name} for name in names}
    return Settings.model_validate({"targets": targets})


async def test_what_a_reload_takes_away_is_closed_unless_another_configuration_keeps_it_open() -> (
    None
):
    registry = LocalWorkspaceRegistry(build_metrics(), version="1")
    first = Upstreams(of_instances("one", "two"), registry, lambda *_: None)
    second = Upstreams(of_instances("two", "three"), registry, lambda *_: None, first)
    kept = first.keep_open()
    first.close()
    assert len(registry) == 3
    kept.close()
    assert len(registry) == 2
    assert second["two"] is first["two"]
    first.close()
    assert len(registry) == 2, "closing twice releases once"
    second.close()
    assert len(registry) == 0


async def test_an_account_that_comes_back_while_it_is_open_keeps_its_tokens() -> None:
    registry = LocalWorkspaceRegistry(build_metrics(), version="1")
    first = Upstreams(of_instances("one"), registry, lambda *_: None)
    with first["one"].use:  # a dial under way
        second = Upstreams(of_instances("two"), registry, lambda *_: None, first)
        first.close()
        third = Upstreams(of_instances("one", "two"), registry, lambda *_: None, second)
        second.close()
    assert third["one"] is not first["one"]
    assert third["one"].account is first["one"].account
    assert len(registry) == 2
    third.close()


async def test_a_certificate_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    # It is read on the event loop: a reload would have stopped every session.
    os.mkfifo(tmp_path / "ca.pem")
    upstream = {"endpoint": ENDPOINT + "one", "ssl_root_cert": str(tmp_path / "ca.pem")}
    registry = LocalWorkspaceRegistry(build_metrics(), version="1")
    with pytest.raises(ConfigurationError, match="it is not a regular file"):
        Upstreams(Settings.model_validate({"upstream": upstream}), registry, lambda *_: None)
    await registry.close()


async def test_the_compiled_context_is_made_with_the_upstream_and_not_by_its_first_session(
    tmp_path: Path,
) -> None:
    # Python's was, and the compiled one at the first dial: reading the system's authorities, tens
    # of milliseconds, stopped every session, and what only the compiled one refuses showed late.
    need_compiled("when its context is made")
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    upstream = {"endpoint": ENDPOINT + "one", "ssl_root_cert": str(path)}
    registry = LocalWorkspaceRegistry(build_metrics(), version="1")
    Upstreams(Settings.model_validate({"upstream": upstream}), registry, lambda *_: None)
    made = tls._compiled_context.cache_info().misses
    tls.client_context("verify-full", str(path), accelerated=True)
    assert tls._compiled_context.cache_info().misses == made
    await registry.close()


async def test_a_host_with_a_password_needs_no_resource_to_mint_for(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("not-a-real-password")
    values = {
        "upstream": {"host": "db.example.com", "user": "app"},
        "credentials": {"password_file": str(password)},
    }
    registry = LocalWorkspaceRegistry(build_metrics(), version="1")
    upstreams = Upstreams(Settings.model_validate(values), registry, lambda *_: None)
    assert upstreams["upstream"].account is None
    await registry.close()


async def test_the_authorities_of_a_catalogues_shards_are_read_at_the_start(tmp_path: Path) -> None:
    values = {
        "upstream": {"ssl_root_cert": str(tmp_path / "missing.pem")},
        "targets": {"main": {"endpoint": ENDPOINT + "map", "ssl_root_cert": "system"}},
        "catalogue": {"target": "main"},
        "routing": {"shard_map": "tenants"},
        "shard_maps": {"tenants": {"catalogue": True}},
    }
    registry = LocalWorkspaceRegistry(build_metrics(), version="1")
    with pytest.raises(ConfigurationError, match=r"upstream\.ssl_root_cert"):
        Upstreams(Settings.model_validate(values), registry, lambda *_: None)
    await registry.close()
