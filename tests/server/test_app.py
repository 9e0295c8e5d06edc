"""The composition root: what it builds, where it listens, and what it leaves when it ends."""

import asyncio
import re
from pathlib import Path

import pytest

from proxy.config import ConfigurationError, Settings
from proxy.errors import ErrorKind
from proxy.server.metric_labels import build_metrics
from proxy.server.serving import serving
from proxy.session.end_reason import EndReason
from proxy.session.session_log import StartupFailure
from proxy.wire.violations import ClientReason
from tests.support.admin_address import ask
from tests.support.compiled import need_compiled
from tests.support.running import nothing_left

ENDPOINT = "projects/p/branches/b/endpoints/e"


def settings(**sections: object) -> Settings:
    values = {
        "listen": {"port": 0},
        "admin": {"port": 0},
        "upstream": {"endpoint": ENDPOINT},
        **sections,
    }
    return Settings.model_validate(values)


async def test_it_serves_without_having_dialled_anybody() -> None:
    # Neither workspace nor upstream exists here: readiness is about the proxy alone.
    async with serving(settings()) as app:
        assert app.listen_port > 0
        assert app.admin is not None
        reader, writer = await asyncio.open_connection(app.admin.host, app.admin.port)
        writer.write(b"GET /readiness HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        writer.close()
        await writer.wait_closed()


async def test_the_admin_address_can_be_left_out() -> None:
    async with serving(settings(admin={"enabled": False})) as app:
        assert app.admin is None


async def test_when_it_ends_ports_tasks_and_files_are_free() -> None:
    async with serving(settings()):
        pass  # the first start of all opens what a process keeps
    async with nothing_left():
        async with serving(settings()) as app:
            host, port = app.listen_host, app.listen_port
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, port)
        async with serving(settings(listen={"port": port})) as again:
            assert again.listen_port == port


async def test_two_proxies_in_one_process_count_apart() -> None:
    async with serving(settings()) as one, serving(settings()) as two:
        _, writer = await asyncio.open_connection(one.listen_host, one.listen_port)
        writer.close()
        await writer.wait_closed()
        assert two.metrics.value("connections_accepted_total") == 0


async def test_new_sessions_get_the_compiled_relay_until_a_reload_says_no() -> None:
    need_compiled("a reload that turns it off")
    async with serving(settings()) as app:
        assert app.metrics.value("build_info", acceleration="used") == 1
        changes = app.reload(settings(upstream={"endpoint": ENDPOINT, "accelerated": False}))
        assert changes.reloadable == ("upstream.accelerated",)
        assert app.metrics.value("build_info", acceleration="off") == 1
        assert app.metrics.value("build_info") == 1


async def test_a_busy_port_is_a_plain_os_error_and_leaves_nothing() -> None:
    async with serving(settings()) as app:
        assert app.admin is not None
        await ask(app.admin.port, "/liveness")  # its server has started
        async with nothing_left():
            with pytest.raises(OSError, match="in use"):
                async with serving(settings(listen={"port": app.listen_port})):
                    pass


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    with pytest.raises(LookupError, match="mine"):
        async with serving(settings()):
            raise LookupError("mine")


async def test_a_certificate_file_that_cannot_be_used_is_reported_at_once(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pem")
    upstream = {"endpoint": ENDPOINT, "ssl_root_cert": absent}
    with pytest.raises(ConfigurationError, match=r"upstream\.ssl_root_cert"):
        async with serving(settings(upstream=upstream)):
            pass


def test_every_reason_word_has_its_own_series_in_the_metrics() -> None:
    metrics = build_metrics()
    failures = [kind.value.reason for kind in ErrorKind] + [*ClientReason, *StartupFailure]
    for reason in failures:
        metrics.startup_failed(reason)
        assert metrics.value("startup_failures_total", reason=reason) >= 1, reason
    for end in EndReason:
        metrics.session_ended(end)
        assert metrics.value("sessions_ended_total", reason=end) == 1
    assert metrics.value("startup_failures_total", reason="other") == 0


def test_reason_words_are_words() -> None:
    words = [kind.value.reason for kind in ErrorKind] + [*ClientReason, *StartupFailure, *EndReason]
    assert [word for word in words if not re.fullmatch(r"[a-z][a-z0-9_]*", word)] == []
