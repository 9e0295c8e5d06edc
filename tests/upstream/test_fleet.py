"""Ways across a reload: which are taken over, and which begin anew."""

import os
from pathlib import Path

import pytest

from proxy.app import build_metrics
from proxy.config import ConfigurationError, Settings
from proxy.upstream.fleet import Accounts, Fleet

ENDPOINT = "projects/p/branches/b/endpoints/"


def settings(connects_max: int) -> Settings:
    targets = {
        "one": {"endpoint": ENDPOINT + "one"},
        "two": {"endpoint": ENDPOINT + "two", "connects_max": connects_max},
    }
    return Settings.model_validate({"targets": targets})


async def test_a_way_that_is_configured_as_before_keeps_its_dialer_and_so_its_places() -> None:
    # With a new dialer each reload would allow another `connects_max` sessions to be opened.
    accounts = Accounts(build_metrics(), version="1")
    try:
        before = Fleet(settings(5), accounts, lambda *_: None)
        after = Fleet(settings(6), accounts, lambda *_: None, before)
        assert after["one"] is before["one"]
        assert after["two"].dialer is not before["two"].dialer
    finally:
        await accounts.close()


async def test_a_certificate_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    # It is read on the event loop: a reload would have stopped every session.
    os.mkfifo(tmp_path / "ca.pem")
    upstream = {"endpoint": ENDPOINT + "one", "ssl_root_cert": str(tmp_path / "ca.pem")}
    accounts = Accounts(build_metrics(), version="1")
    with pytest.raises(ConfigurationError, match="it is not a regular file"):
        Fleet(Settings.model_validate({"upstream": upstream}), accounts, lambda *_: None)
    await accounts.close()
