"""The processes of clients, as the kernel's tables name them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from proxy.observe.client_processes import ClientProcesses
from proxy.observe.session_page import SessionRow

CLIENT = """
import socket, sys
family, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
connection = socket.socket(family)
connection.connect((host, port))
sys.stdin.read()
"""


def row(client: str, pid: int | None = None) -> SessionRow:
    return cast(SessionRow, {"client": client, "pid": pid, "command": None})


@pytest.mark.parametrize(
    ("listens", "family", "host", "shown"),
    [
        (("127.0.0.1", 0), socket.AF_INET, "127.0.0.1", "127.0.0.1:{}"),
        (("127.0.0.1", 0), socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1:{}"),
        (("::1", 0), socket.AF_INET6, "::1", "[::1]:{}"),
    ],
)
async def test_the_process_of_a_client_on_loopback_is_found(
    listens: tuple[str, int], family: int, host: str, shown: str
) -> None:
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    listener_family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server(listens, family=listener_family) as listener:
        arguments = [sys.executable, "-c", CLIENT, str(int(family)), host]
        port = str(listener.getsockname()[1])
        with subprocess.Popen([*arguments, port], stdin=subprocess.PIPE) as client:  # noqa: ASYNC220
            accepted, address = listener.accept()
            with accepted:
                found = [row(shown.format(address[1])), row(shown.format(1)), row("192.0.2.1:5")]
                await ClientProcesses().add_to(found, {int(port)})
            assert client.stdin is not None
            client.stdin.close()
    assert found[0]["pid"] == client.pid
    assert found[0]["command"]
    assert [(one["pid"], one["command"]) for one in found[1:]] == [(None, None)] * 2


async def test_the_command_of_a_unix_sockets_process_is_its_name_alone() -> None:
    rows = [row("", os.getpid()), row("", 2**22 + 1), row("")]
    await ClientProcesses().add_to(rows, ())
    assert rows[0]["command"] == Path("/proc/self/comm").read_text().strip()  # noqa: ASYNC240
    assert [one["command"] for one in rows[1:]] == [None, None]


async def test_a_connection_from_the_same_port_to_somewhere_else_is_not_taken_for_the_clients() -> (
    None
):
    # The kernel gives one port of a client to several connections, if they lead elsewhere.
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        reused = [
            (socket.SOL_SOCKET, socket.SO_REUSEADDR),
            (socket.SOL_SOCKET, socket.SO_REUSEPORT),
        ]
        with socket.socket() as client, socket.socket() as elsewhere:
            for one in (client, elsewhere):
                for level, option in reused:
                    one.setsockopt(level, option, 1)
            client.bind(("127.0.0.1", 0))
            elsewhere.bind(client.getsockname())
            elsewhere.connect(other.getsockname())
            rows = [row(f"127.0.0.1:{client.getsockname()[1]}")]
            await ClientProcesses().add_to(rows, {listener.getsockname()[1]})
            assert rows[0]["pid"] is None, "it is connected elsewhere"
            client.connect(listener.getsockname())
            await ClientProcesses().add_to(rows, {listener.getsockname()[1]})
            assert rows[0]["pid"] == os.getpid()
