"""Access to the admin address: no web page by DNS rebinding, and quit only from this machine."""

import pytest
from starlette.requests import Request

from proxy.observe.admin import serve_admin
from proxy.observe.admin_access import is_from_this_machine
from proxy.observe.admin_state import ReloadOutcome, ReloadResult
from tests.support.admin_address import LOOPBACK, ScriptedAdminState, ask


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9090", 200),
        ("127.0.0.1:9090", 200),
        ("10.1.2.3", 200),  # an address is not a name that a page could rebind
        ("[::1]:9090", 200),
        ("rebound.example.com", 421),
        ("rebound.example.com:9090", 421),
        ("localhost.example.com", 421),
        ("127.0.0.1.example.com", 421),
        ("[rebound]", 421),
    ],
)
async def test_on_loopback_a_foreign_name_is_refused(host: str, status: int) -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        for path in ("/status", "/", "/metrics", "/nowhere"):
            answer = await ask(address.port, path, headers=f"Host: {host}\r\n")
            assert answer.status == (status if path != "/nowhere" or status != 200 else 404)


async def test_a_probe_without_a_host_is_served() -> None:
    # HTTP/1.0 has none, and simple health checkers send none.
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, "/readiness HTTP/1.0\r\nX:", headers="")
        assert answer.status == 200


async def test_the_name_that_is_configured_is_no_foreign_name() -> None:
    async with serve_admin(ScriptedAdminState(), host="localhost", port=0) as address:
        headers = "Host: localhost:1\r\n"
        answer = await ask(address.port, "/status", host=address.host, headers=headers)
        assert answer.status == 200


async def test_an_address_for_other_machines_accepts_any_name() -> None:
    # There the network decides who can connect, and which name a service has.
    async with serve_admin(ScriptedAdminState(), host="0.0.0.0", port=0) as address:
        headers = "Host: proxy.monitoring.svc\r\n"
        assert (await ask(address.port, "/metrics", headers=headers)).status == 200


@pytest.mark.parametrize("path", ["/sessions", "/lookup?key=1"])
async def test_there_a_foreign_name_is_not_this_machine(path: str) -> None:
    # A page reads what `kubectl port-forward` leads to by DNS rebinding. Its GET has no Origin, and
    # comes from 127.0.0.1 there.
    async with serve_admin(ScriptedAdminState(), host="0.0.0.0", port=0) as address:
        rebound = await ask(address.port, path, headers="Host: rebound.example.com:9090\r\n")
        own = await ask(address.port, path, headers="Host: localhost:9090\r\n")
    assert (rebound.status, own.status) == (403, 200)


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200)]
)
async def test_a_script_or_an_image_of_another_site_starts_no_search(
    site: str, status: int
) -> None:
    shown = ScriptedAdminState()
    async with serve_admin(shown, host=LOOPBACK, port=0) as address:
        headers = f"Host: localhost\r\nSec-Fetch-Site: {site}\r\n"
        answer = await ask(address.port, "/sessions?processes", headers=headers)
    assert (answer.status, bool(shown.asked_for_sessions)) == (status, status == 200)


async def test_quit_is_a_post_from_this_machine() -> None:
    shown = ScriptedAdminState()
    async with serve_admin(shown, host=LOOPBACK, port=0, quit_allowed=True) as address:
        refused = await ask(address.port, "/quitquitquit")
        assert (refused.status, shown.quits) == (405, 0)
        assert refused.headers["allow"] == "POST"
        assert (await ask(address.port, "/quitquitquit", "HEAD")).status == 405
        answer = await ask(address.port, "/quitquitquit", "POST")
        assert (answer.status, answer.body, shown.quits) == (202, b"draining\n", 1)


async def test_p46_reconnect_is_a_post_and_needs_no_permission() -> None:
    shown = ScriptedAdminState()
    async with serve_admin(shown, host=LOOPBACK, port=0) as address:
        assert (await ask(address.port, "/reconnect")).status == 405
        assert shown.reconnects == 0
        assert (await ask(address.port, "/reconnect", "POST")).status == 200
        shown.reconnect_succeeds = False
        answer = await ask(address.port, "/reconnect", "POST")
    assert (answer.status, shown.reconnects) == (503, 2)
    assert b"a worker did not answer" in answer.body


@pytest.mark.parametrize(
    ("result", "status"), list(zip(ReloadResult, (200, 422, 503, 202, 409), strict=True)), ids=str
)
async def test_a_reload_is_a_post_and_answers_what_became_of_it(
    result: ReloadResult, status: int
) -> None:
    outcome = ReloadOutcome(result, ("log.level",), ("listen.port",), ("upstream.port: wrong",))
    async with serve_admin(
        ScriptedAdminState(reload_outcome=outcome), host=LOOPBACK, port=0
    ) as address:
        assert (await ask(address.port, "/reload")).status == 405
        answer = await ask(address.port, "/reload", "POST")
    assert answer.status == status
    assert answer.json == {
        "result": result,
        "changed": ["log.level"],
        "restart": ["listen.port"],
        "problems": ["upstream.port: wrong"],
    }


async def test_without_permission_no_request_quits() -> None:
    shown = ScriptedAdminState()
    async with serve_admin(shown, host=LOOPBACK, port=0) as address:
        assert (await ask(address.port, "/quitquitquit", "POST")).status == 404
    assert shown.quits == 0


@pytest.mark.parametrize(
    "header",
    [
        "Origin: https://attacker.example",  # a page's form or fetch: it needs no answer to do harm
        "Origin: null",
        "X-Forwarded-For: 127.0.0.1",  # a proxy on this machine stands in between
        "Forwarded: for=127.0.0.1",
    ],
)
@pytest.mark.parametrize("path", ["/quitquitquit", "/reconnect", "/reload"])
async def test_p46_posts_are_refused_to_web_pages_and_through_proxies(
    header: str, path: str
) -> None:
    shown = ScriptedAdminState()
    async with serve_admin(shown, host=LOOPBACK, port=0, quit_allowed=True) as address:
        headers = f"Host: localhost\r\n{header}\r\n"
        answer = await ask(address.port, path, "POST", headers=headers)
    assert (answer.status, shown.quits, shown.reconnects) == (403, 0, 0)


@pytest.mark.parametrize(
    ("peer", "may"),
    [
        (("127.0.0.1", 1), True),
        (("127.0.0.6", 1), False),  # Istio hands on from there what others ask
        (("::ffff:127.0.0.6", 1), False),
        (("::1", 1), True),
        (("::ffff:127.0.0.1", 1), True),
        (("10.0.0.7", 1), False),
        (("::ffff:10.0.0.7", 1), False),
        (("fe80::1", 1), False),
        (("localhost", 1), False),  # a name, even of loopback
        (None, False),
    ],
)
def test_only_loopbacks_own_address_may_quit(peer: tuple[str, int] | None, may: bool) -> None:
    request = Request({"type": "http", "headers": [], "client": peer})
    assert is_from_this_machine(request) is may
