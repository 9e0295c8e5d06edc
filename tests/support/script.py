"""The steps of a fake peer: what it sends, what it expects, how it ends.

One list of steps serves a client or a server, over a socket (`play`) or over a pipe in memory
(`tests/property/test_pipes.py`). `Script` itself does no I/O: it is fed what arrives and asked what
to do next, as the proxy's own machines are.
"""

from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ssl import SSLContext
from struct import Struct
from typing import Final

from proxy.wire.messages import Frame
from tests.support.cuts import Cut, byte_by_byte, whole
from tests.support.peer import Peer

_HEADER: Final = Struct("!cI")
_LENGTH: Final = Struct("!I")


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes."""

    content: bytes


@dataclass(frozen=True, slots=True)
class SendSplit:
    """Send these bytes one at a time."""

    content: bytes


@dataclass(frozen=True, slots=True)
class Expect:
    """Read exactly these bytes."""

    content: bytes


@dataclass(frozen=True, slots=True)
class ExpectPacket:
    """Read a packet that begins with its length: a StartupMessage or a CancelRequest."""


@dataclass(frozen=True, slots=True)
class ExpectMessage:
    """Read a message of this type."""

    type: bytes


@dataclass(frozen=True, slots=True)
class ReadBytes:
    """Read so many bytes outside messages: the answers to encryption requests. Or up to the end."""

    count: int


@dataclass(frozen=True, slots=True)
class ReadUntil:
    """Read messages until these types were among them, each as often as it is named. Or to the end.

    What is read is kept and not judged.
    """

    types: bytes


@dataclass(frozen=True, slots=True)
class ReadToEnd:
    """Read messages until the other side ends."""


@dataclass(frozen=True, slots=True)
class StartTLS:
    """Do the server's side of the TLS handshake."""

    context: SSLContext


@dataclass(frozen=True, slots=True)
class Close:
    """End orderly: close_notify where there is TLS, then FIN; read until the other side ends."""


@dataclass(frozen=True, slots=True)
class Reset:
    """End with RST."""


Action = Send | StartTLS | Close | Reset
Step = (
    Action | SendSplit | Expect | ExpectPacket | ExpectMessage | ReadBytes | ReadUntil | ReadToEnd
)


class PeerEnded(Exception):
    """The other side ended while something was expected of it."""


class Script:
    """Goes through steps: `receive_data` feeds it, `next_action` says what the peer does now."""

    def __init__(self, steps: Iterable[Step] = (), cut: Cut = whole) -> None:
        self.packets: list[bytes] = []  # what ExpectPacket and ExpectMessage read
        self.bare = b""  # what ReadBytes read
        self.messages: list[Frame] = []  # what ReadUntil and ReadToEnd read
        self.ended = False
        self.actions_taken = 0
        self._steps = deque(steps)
        self._cut = cut
        self._pieces: deque[bytes] = deque()
        self._buffer = bytearray()
        self._missing: Counter[int] | None = None  # of the ReadUntil that is under way

    @property
    def done(self) -> bool:
        """Whether all steps are over."""
        return not self._steps and not self._pieces

    def receive_data(self, data: bytes) -> None:
        """Take what has arrived."""
        self._buffer += data

    def receive_eof(self) -> None:
        """Take the end of the stream."""
        self.ended = True

    def trailing_data(self) -> bytes:
        """Return, once, what has arrived and was not read by a step."""
        return self._take(len(self._buffer))

    def next_action(self) -> Action | None:
        """Return what to do now; None waits for more bytes, or is the end of the script.

        Raises AssertionError for bytes that are not the expected ones, PeerEnded for none.
        """
        while not self._pieces:
            if not self._steps:
                return None
            match self._steps[0]:
                case Send(content):
                    self._pieces.extend(self._cut(content))
                case SendSplit(content):
                    self._pieces.extend(byte_by_byte(content))
                case StartTLS() | Close() | Reset() as action:
                    self._steps.popleft()
                    self.actions_taken += 1
                    return action
                case step if not self._has_read(step):
                    return None
            self._steps.popleft()
        self.actions_taken += 1
        return Send(self._pieces.popleft())

    def _has_read(self, step: Step) -> bool:
        """Read what the step wants; return whether it has all of it."""
        match step:
            case ReadBytes(count):
                if len(self._buffer) < count and not self.ended:
                    return False
                self.bare += self._take(count)
                return True
            case ReadUntil(types):
                return self._has_read_until(types)
            case ReadToEnd():
                while self._read_message():
                    pass
                return self.ended
        found = self._expected(step)
        if not found and self.ended:
            raise PeerEnded
        return found

    def _expected(self, step: Step) -> bool:
        match step:
            case Expect(content):
                found = bytes(self._buffer[: len(content)])
                assert content.startswith(found), f"expected {content!r}, got {found!r}"
                if len(found) < len(content):
                    return False
                self._take(len(content))
            case ExpectPacket():
                return self._keep(_LENGTH.size, 0)
            case ExpectMessage(kind):
                found = bytes(self._buffer[:1])
                assert kind.startswith(found), f"expected {kind!r}, got {found!r}"
                return self._keep(_HEADER.size, 1)
        return True

    def _keep(self, header_bytes: int, length_at: int) -> bool:
        """Keep the packet at the head of the buffer; False if it is not whole."""
        if len(self._buffer) < header_bytes:
            return False
        end = length_at + _LENGTH.unpack_from(self._buffer, length_at)[0]
        if len(self._buffer) < end:
            return False
        self.packets.append(self._take(end))
        return True

    def _has_read_until(self, types: bytes) -> bool:
        if self._missing is None:
            self._missing = Counter(types)
        while self._missing and (frame := self._read_message()):
            self._missing -= Counter(frame.type)
        if self._missing and not self.ended:
            return False
        self._missing = None
        return True

    def _read_message(self) -> Frame | None:
        """Take a whole message out of the buffer. A length that cannot be is that of its header."""
        if len(self._buffer) < _HEADER.size:
            return None
        kind, length = _HEADER.unpack_from(self._buffer)
        end = 1 + max(length, 4)
        if len(self._buffer) < end:
            return None
        frame = Frame(kind, self._take(end)[_HEADER.size :])
        self.messages.append(frame)
        return frame

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


async def play(peer: Peer, *steps: Step, cut: Cut = whole) -> Script:
    """Go through steps on a connection. What arrives beyond them is left to be received.

    Raises AssertionError and PeerEnded as the script does, ssl.SSLError where TLS fails.
    """
    script = Script(steps, cut)
    while True:
        action = script.next_action()
        match action:
            case Send(content):
                with suppress(OSError):  # one that has left; what it said is still to be read
                    await peer.send(content)
            case StartTLS(context):
                peer.unread(script.trailing_data())
                await peer.handshake(context, server_side=True)
            case Close():
                peer.end_orderly()
                await peer.ended()
            case Reset():
                peer.reset()
            case None if script.done:
                if not script.ended:
                    peer.unread(script.trailing_data())
                return script
            case None:
                await _receive(peer, script)


async def _receive(peer: Peer, script: Script) -> None:
    try:
        received = await peer.receive(None)
    except ConnectionError:
        received = b""
    if received:
        script.receive_data(received)
    else:
        script.receive_eof()
