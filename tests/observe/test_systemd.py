"""sd_notify, over real datagram sockets."""

import os
import socket
from pathlib import Path

import pytest

from proxy.observe.systemd import READY, STOPPING, notify, reloading


@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_reaches_the_socket_in_notify_socket(tmp_path: Path, abstract: bool) -> None:
    if abstract and os.uname().sysname != "Linux":
        pytest.skip("abstract sockets are Linux's")
    name = f"@lakebase-auth-proxy-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("\0" + name[1:] if abstract else name)
        supervisor.settimeout(5)
        notify(READY, {"NOTIFY_SOCKET": name})
        notify(STOPPING, {"NOTIFY_SOCKET": name})
        assert [supervisor.recv(100), supervisor.recv(100)] == [b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize("path", [None, "", "relative", "/nonexistent/notify"])
def test_without_a_service_manager_nothing_happens(path: str | None) -> None:
    notify(READY, {} if path is None else {"NOTIFY_SOCKET": path})


def test_a_service_manager_that_does_not_listen_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(path)
        for _ in range(5000):  # more than any queue of datagrams holds
            notify(READY, {"NOTIFY_SOCKET": path})


def test_a_reload_is_sent_with_the_monotonic_time() -> None:
    first, second = reloading().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0
