"""The acceptor: the listening sockets of a proxy whose workers serve.

For: accepting, and passing on what was accepted. Not for: choosing the worker (`supervisor`), or
reading a byte of any connection.

Invariants: a connection is passed on or held, never dropped while the proxy accepts. At most one is
held; the rest wait in the kernel's backlog.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from proxy.config import ListenSettings
from proxy.observe.logs import get_logger
from proxy.session.listen_sockets import Address, open_sockets
from proxy.session.listener import STARTING_WARNING_SECONDS

# Connections accepted before the event loop does anything else.
ACCEPTS_MAX: Final = 32
# How long nothing is accepted after no worker took a connection, or no descriptor was left.
RETRY_SECONDS: Final = 0.05

_log = get_logger(__name__)

PassConnection = Callable[[socket.socket], bool]
"""Passes a connection to a worker. Returns whether one took it."""


class Acceptor:
    """Accepts connections and passes them on."""

    def __init__(self, settings: ListenSettings, pass_connection: PassConnection) -> None:
        self._settings = settings
        self._pass_connection = pass_connection
        self._listening: list[socket.socket] = []
        self._held: socket.socket | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._unix_path: Path | None = None
        self._failure_logged_at: float | None = None

    def open(self) -> Sequence[Address]:
        """Listen, and return the addresses. Clients wait in the backlog until `start`.

        Raises OSError.
        """
        opened = open_sockets(self._settings)
        self._listening = [*opened.tcp, *([opened.unix] if opened.unix else [])]
        self._unix_path = opened.unix_path
        return opened.addresses

    def start(self) -> None:
        """Start to accept."""
        loop = asyncio.get_running_loop()
        for sock in self._listening:
            loop.add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """Stop accepting, and close what is held. May be called again."""
        self._pause()
        if self._retry is not None:
            self._retry.cancel()
        for sock in self._listening:
            sock.close()
        self._listening.clear()
        if self._held is not None:
            self._held.close()
            self._held = None
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._unix_path = None

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                self._held = self._held or listening.accept()[0]
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._log_failure(error)
                self._pause_and_retry()
                return
            if not self._pass_connection(self._held):
                self._pause_and_retry()
                return
            self._held.close()
            self._held = None

    def _log_failure(self, error: OSError) -> None:
        now = asyncio.get_running_loop().time()
        logged_at = self._failure_logged_at
        if logged_at is None or now - logged_at >= STARTING_WARNING_SECONDS:
            self._failure_logged_at = now
            _log.error("cannot accept", error=error.strerror)

    def _pause_and_retry(self) -> None:
        self._pause()
        self._retry = asyncio.get_running_loop().call_later(RETRY_SECONDS, self.start)

    def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in self._listening:
            loop.remove_reader(sock)
