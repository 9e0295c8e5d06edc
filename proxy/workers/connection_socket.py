"""The socket over which the supervisor passes client connections to one worker.

For: sending a connection's descriptor, and serving those that arrive. Not for: choosing the worker
(`supervisor`), or counting what it has (`shared_counters`).

Invariant: a packet is one connection: its descriptor, and the id by which its log lines are known.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from proxy.observe.logs import get_logger
from proxy.session.listen_sockets import Address
from proxy.session.listener import STARTING_WARNING_SECONDS, Listener

_ID_BYTES: Final = 8

_log = get_logger(__name__)


def connection_socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends, which do not block. Raises OSError."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setblocking(False)
    return pair


def send_connection(worker: socket.socket, client: socket.socket, connection_id: int) -> bool:
    """Pass a client's connection to a worker. Return False if the worker is stuck or dead."""
    try:
        socket.send_fds(worker, [connection_id.to_bytes(_ID_BYTES)], [client.fileno()])
    except OSError:
        return False
    return True


class ReceivedConnections:
    """The connections that a worker serves, in place of those that a listener accepts."""

    def __init__(self, sock: socket.socket, listener: Listener, ended: Callable[[], None]) -> None:
        """`ended` is called once for each connection that was received and has ended."""
        self._socket = sock
        self._listener = listener
        self._ended = ended
        self._loss_logged_at: float | None = None

    @asynccontextmanager
    async def accepting(self) -> AsyncIterator[Sequence[Address]]:
        """Receive while the block runs, then end what is left. A worker has no address to yield."""
        async with self._listener.adopting():
            asyncio.get_running_loop().add_reader(self._socket, self._receive)
            try:
                yield ()
            finally:
                self._close()

    async def drain(self, seconds: float) -> int:
        """End all sessions, also of connections still in the socket. Return how many were cut."""
        self._receive()
        self._close()
        return await self._listener.drain(seconds)

    def _receive(self) -> None:
        while self._socket.fileno() >= 0:  # ends when the socket is empty
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._socket, _ID_BYTES, 1)
            except BlockingIOError:
                return
            except OSError as error:
                _log.error("cannot receive a connection", error=error.strerror)
                return
            if packet:
                self._serve(int.from_bytes(packet), descriptors)
            else:
                self._close()

    def _serve(self, connection_id: int, descriptors: list[int]) -> None:
        if not descriptors:  # the kernel drops those that exceed this process's limit
            self._log_loss()
            self._ended()
            return
        client = socket.socket(fileno=descriptors[0])
        client.setblocking(False)
        self._listener.adopt(client, connection_id, self._ended)

    def _log_loss(self) -> None:
        """Log that connections are lost, once in `STARTING_WARNING_SECONDS`."""
        now = asyncio.get_running_loop().time()
        if self._loss_logged_at is None or now - self._loss_logged_at >= STARTING_WARNING_SECONDS:
            self._loss_logged_at = now
            _log.error("connections are lost: no file descriptor is left")

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
