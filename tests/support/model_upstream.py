"""What PostgreSQL answers to a client's messages, and whether it owes something: a small model.

For: judging what a relay says of a session, by code that has nothing in common with it. Queries are
words (`QUERIES`), of which the answer is known. Not for: what PostgreSQL itself does, which
`tests/differential` shows. Invariant: what was received and whole is answered, in order.
"""

from dataclasses import dataclass, field
from typing import Final

from tests.wire.driving import message

QUERIES: Final = (b"ok", b"notice", b"begin", b"commit", b"fail", b"copy in", b"copy out")
_EXTENDED: Final = {b"P": b"1", b"B": b"2", b"D": b"n", b"C": b"3"}
_TYPES: Final = b"QPBEDCSHFXdcf"
_ERROR: Final = message(b"E", b"SERROR\0\0")
_COPY_IN: Final = message(b"G", bytes(3))
_COMPLETE: Final = message(b"C", b"OK\0")
_ROWS: Final = message(b"D", b"\0\1\0\0\0\7" + message(b"Z", b"I")) * 2 + _COMPLETE
_NOTICE: Final = message(b"N", b"SNOTICE\0M" + message(b"Z", b"I")[:1] + b"\0\0")
_COPY_OUT: Final = message(b"H", bytes(3)) + message(b"d", b"1\n") * 2 + message(b"c") + _COMPLETE


@dataclass(slots=True)
class ModelUpstream:
    """The other end of a session after its login."""

    answers: bytearray = field(default_factory=bytearray)
    """What it has said and was not taken."""
    received: bytearray = field(default_factory=bytearray)
    """All that it was sent."""
    ended: bool = False
    """It has read a Terminate, or what is no message."""
    _unread: bytearray = field(default_factory=bytearray)
    _status: bytes = b"I"
    _skips: bool = False  # to the next Sync, after an error
    _unsynced: bool = False
    _copy: bytes = b""  # the type of the message whose COPY takes data: Q or E

    @property
    def quiet(self) -> bool:
        """Whether it waits for a message outside a transaction, and all it said was taken."""
        return not (
            self.answers
            or self._unread
            or self._skips
            or self._unsynced
            or self._copy
            or self.ended
        ) and (self._status == b"I")

    def receive(self, data: bytes) -> None:
        """Receive bytes, and answer the messages that are whole."""
        self.received += data
        self._unread += data
        while len(self._unread) > 4 and not self.ended:
            size = 1 + int.from_bytes(self._unread[1:5], "big")
            if size < 5 or self._unread[0] not in _TYPES:
                self.ended = True  # FATAL: it has lost the messages' boundaries
            if len(self._unread) < size or self.ended:
                return
            kind, payload = bytes(self._unread[:1]), bytes(self._unread[5:size])
            del self._unread[:size]
            self._read(kind, payload)

    def take(self, count: int) -> bytes:
        """Return up to so many bytes of what it has said."""
        taken = bytes(self.answers[:count])
        del self.answers[:count]
        return taken

    # -- inside ----------------------------------------------------------------------------------

    def _read(self, kind: bytes, payload: bytes) -> None:
        if kind == b"X":
            self.ended = True
        elif self._copy:
            self._read_in_copy(kind)
        elif kind == b"S":
            self._skips = self._unsynced = False
            self._ready()
        elif self._skips or kind in b"Hdcf":
            pass
        elif kind == b"Q":
            self._unsynced = False  # a Query ends the implicit transaction, too
            self._run(payload.rstrip(b"\0"), kind)
        elif kind == b"F":
            self.answers += message(b"V", bytes(4))
            self._ready()
        else:
            self._unsynced = True
            if kind == b"E":
                self._run(payload.rstrip(b"\0"), kind)
            else:
                self.answers += message(_EXTENDED[kind])

    def _read_in_copy(self, kind: bytes) -> None:
        if kind in b"dHS":
            return
        of, self._copy = self._copy, b""
        if kind == b"c":
            self.answers += _COMPLETE
        else:
            self._fail(of)
        if of == b"Q":
            self._ready()

    def _run(self, word: bytes, kind: bytes) -> None:
        if word == b"copy in":
            self.answers += _COPY_IN
            self._copy = kind
            return
        if word == b"fail":
            self._fail(kind)
        elif word == b"copy out":
            self.answers += _COPY_OUT
        else:
            self.answers += (_NOTICE if word == b"notice" else b"") + _ROWS
            if word in (b"begin", b"commit"):
                self._status = b"T" if word == b"begin" else b"I"
        if kind == b"Q":
            self._ready()

    def _fail(self, kind: bytes) -> None:
        self.answers += _ERROR
        self._status = b"I" if self._status == b"I" else b"E"
        self._skips = kind == b"E"

    def _ready(self) -> None:
        self.answers += message(b"Z", self._status)
