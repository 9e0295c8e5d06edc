"""A port of 127.0.0.1 that keeps its number while connections are refused.

For: the gateway and the workspace API, which tests close and open again. A port that is bound and
does not listen refuses connections, and no other program can take it.
"""

import socket
from typing import Final

LOOPBACK: Final = "127.0.0.1"


class HeldPort:
    """A port, held by a socket except while its owner listens on that."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        """0 is replaced by a number that the system chooses when the port is held."""
        self._holder: socket.socket | None = None

    def hold(self) -> None:
        """Bind the port; its owner has stopped listening. Raises OSError."""
        if self._holder is None:
            holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((LOOPBACK, self.number))
            self.number = holder.getsockname()[1]
            self._holder = holder

    def take(self) -> socket.socket | None:
        """Return the bound socket to listen on; None if it was taken before."""
        holder, self._holder = self._holder, None
        return holder

    def close(self) -> None:
        """Release the port."""
        if self._holder is not None:
            self._holder.close()
            self._holder = None
