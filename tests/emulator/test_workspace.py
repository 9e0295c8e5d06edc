"""The workspace's faults: how the SDK reacts to them, and that they end."""

import asyncio
import json
import signal
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from databricks.sdk.errors import (
    DeadlineExceeded,
    InternalError,
    NotFound,
    PermissionDenied,
    ResourceConflict,
    Unauthenticated,
)
from databricks.sdk.errors.base import DatabricksError

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.faults import HANG, Reply
from proxy.emulator.lakebase import Lakebase
from tests.emulator.test_api import with_client

NOT_RETRIED = (
    (faults.UNAUTHENTICATED, Unauthenticated, "Credential"),
    (faults.ACCESS_MISSING, PermissionDenied, "workspace-access entitlement"),
    (faults.IP_BLOCKED, PermissionDenied, "blocked by Databricks IP ACL"),
    (faults.PAT_SCOPE, PermissionDenied, "required scopes"),
    (faults.NUMERIC_CODE, PermissionDenied, "permission"),
    (faults.NOT_FOUND, NotFound, "does not exist"),
    (faults.ABORTED, ResourceConflict, "maintenance"),
    (faults.INTERNAL, InternalError, "Internal"),
    (faults.BAD_GATEWAY, DatabricksError, "unable to parse response"),
    (faults.GATEWAY_TIMEOUT, DeadlineExceeded, "Deadline"),
)


def _mint(lakebase: Lakebase) -> Any:
    name = lakebase["one"].endpoint.name
    return with_client(lakebase, lambda c: c.postgres.generate_database_credential(name))


@pytest.mark.parametrize(("fault", "kind", "text"), NOT_RETRIED)
async def test_an_error_reaches_the_caller_once(
    lakebase: Lakebase, fault: Reply, kind: type[Exception], text: str
) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, fault)
    with pytest.raises(kind, match=text):
        await _mint(lakebase)
    assert lakebase.workspace.calls[Call.CREDENTIAL] == 1
    assert lakebase.workspace.mints == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", [faults.THROTTLED, faults.THROTTLED_NO_DELAY, faults.UNAVAILABLE])
async def test_a_fault_that_passes_is_retried(lakebase: Lakebase, fault: Reply) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, fault, times=1)
    await _mint(lakebase)
    assert lakebase.workspace.calls[Call.CREDENTIAL] == 2
    assert len(lakebase.workspace.mints) == 1


async def test_an_empty_reply_is_a_credential_without_a_token(lakebase: Lakebase) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, faults.EMPTY)
    assert (await _mint(lakebase)).token is None


async def test_a_reply_that_is_not_json_is_an_error(lakebase: Lakebase) -> None:
    lakebase.workspace.fail(Call.CREDENTIAL, faults.NOT_JSON)
    with pytest.raises(json.JSONDecodeError):
        await _mint(lakebase)


async def test_a_credential_can_have_expired_when_it_is_handed_out(lakebase: Lakebase) -> None:
    lakebase.workspace.api.credential_seconds = -60
    credential = await _mint(lakebase)
    assert credential.expire_time.seconds < time.time()


async def test_a_token_login_that_hangs_goes_on_when_the_fault_is_cleared(
    lakebase: Lakebase,
) -> None:
    lakebase.workspace.fail(Call.TOKEN, HANG)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        minting = group.create_task(_mint(lakebase))
        await lakebase.workspace.called(Call.TOKEN)
        assert not minting.done()
        lakebase.workspace.clear_faults()
    assert minting.result().token


async def test_a_call_that_hangs_does_not_hold_up_the_end(lakebase: Lakebase) -> None:
    lakebase.workspace.fail(Call.DISCOVERY, HANG)
    url = f"{lakebase.workspace_url}/.well-known/databricks-config"
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        asking = group.create_task(asyncio.to_thread(_status, url))
        await lakebase.workspace.called(Call.DISCOVERY)
        await lakebase.workspace.__aexit__(None, None, None)
    assert asking.result() == 0


async def test_a_closed_port_refuses_and_opens_again_under_its_number(lakebase: Lakebase) -> None:
    url = f"{lakebase.workspace_url}/.well-known/databricks-config"
    await lakebase.workspace.refuse_connections()
    assert await asyncio.to_thread(_status, url) == 0
    await lakebase.workspace.accept_connections()
    assert await asyncio.to_thread(_status, url) == 200


async def test_a_path_that_the_api_does_not_have_is_not_found(lakebase: Lakebase) -> None:
    url = f"{lakebase.workspace_url}/api/2.0/clusters/list"
    assert await asyncio.to_thread(_status, url) == 404
    assert not lakebase.workspace.calls


async def test_the_server_takes_over_no_signal(lakebase: Lakebase) -> None:
    assert lakebase.workspace.url.startswith("http://127.0.0.1:")
    assert "uvicorn" not in repr(signal.getsignal(signal.SIGINT))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _status(url: str) -> int:
    """Return the HTTP status, 0 if there is no reply."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0
