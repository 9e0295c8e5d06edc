"""The benchmark's own upstreams: one with network delay, one for many idle sessions."""

import socket
import threading
import time
from pathlib import Path

from psycopg import pq

from bench.connect_time import open_session
from bench.delayed_upstream import ONE_WAY_MILLISECONDS, delayed_upstream
from bench.idle_upstream import idle_upstream
from bench.postgres import Postgres, ServerAddress, write_certificate
from bench.systems import System, direct

SECONDS_MAX = 30


def echo_once(listening: socket.socket) -> None:
    """Echo what one connection sends, until its end."""
    connection, _ = listening.accept()
    with connection:
        while received := connection.recv(65536):
            connection.sendall(received)


def test_a_delayed_upstream_delays_both_directions_and_loses_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=echo_once, args=(listening,))
        thread.start()
        address = ServerAddress(listening.getsockname()[1], tmp_path)
        with (
            delayed_upstream(address, tmp_path) as delayed,
            socket.create_connection(("127.0.0.1", delayed.port), SECONDS_MAX) as client,
        ):
            shortest = min(_round_trip_seconds(client) for _ in range(100))
            assert shortest >= 2 * ONE_WAY_MILLISECONDS / 1e3
            assert shortest < 2.5 * 2 * ONE_WAY_MILLISECONDS / 1e3
            sent = b"".join(number.to_bytes(4) for number in range(50_000))
            sending = threading.Thread(target=client.sendall, args=(sent,))
            sending.start()
            received = b""
            while len(received) < len(sent):
                received += client.recv(65536)
            sending.join(SECONDS_MAX)
            assert received == sent
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        thread.join(SECONDS_MAX)


def _round_trip_seconds(client: socket.socket) -> float:
    started_at = time.perf_counter()
    client.sendall(b"?")
    assert client.recv(1) == b"?"
    return time.perf_counter() - started_at


def test_the_idle_upstream_lets_libpq_in_and_answers(tmp_path: Path) -> None:
    ca_file = write_certificate(tmp_path, tmp_path)
    address = ServerAddress(0, ca_file)
    files = (tmp_path / "server.pem", tmp_path / "server.key")
    with idle_upstream(Postgres(tmp_path, address, *files, tmp_path, tmp_path), tmp_path) as idle:
        system: System = direct(idle)
        sessions = [open_session(system) for _ in range(5)]
        for session in sessions:
            answer = session.exec_(b"SELECT 1")
            assert (answer.status, answer.get_value(0, 0)) == (pq.ExecStatus.TUPLES_OK, b"1")
            assert session.ssl_in_use
            session.finish()
