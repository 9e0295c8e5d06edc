"""The first packets of a gateway connection: SSLRequest and TLS, or a CancelRequest.

It returns the StartupMessage or the CancelRequest. Like Lakebase's front end, it accepts nothing
else: no direct TLS, no GSSAPI, no plaintext startup and no version negotiation.
"""

from collections.abc import Awaitable, Callable
from struct import Struct
from typing import Final

from proxy.emulator.faults import Stage
from proxy.emulator.gateway_state import GatewayState
from proxy.emulator.login import LoginRefused
from proxy.emulator.streams import Stream, StreamEnded
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import CancelRequest, SSLRequest, StartupMessage, parse_first_packet
from proxy.wire.violations import ClientViolation

STARTUP_BYTES_MAX: Final = 10_000  # a StartupMessage must be shorter
_CANCEL_BYTES: Final = 16  # a key of protocol 3.0
_CANCEL_CODE: Final = 1234 << 16 | 5678
_HEADER: Final = Struct("!I")
_FIRST: Final = Struct("!II")

InjectFault = Callable[[Stage], Awaitable[None]]


async def first_packet(
    gateway: GatewayState, stream: Stream, inject_fault: InjectFault
) -> StartupMessage | CancelRequest:
    """Return the client's StartupMessage or CancelRequest. `inject_fault` applies a stage's faults.

    Raises LoginRefused, StreamEnded. The caller bounds its time.
    """
    await inject_fault(Stage.ACCEPTED)
    cancel = await _plain_packet(stream)
    if cancel is not None:
        return cancel
    await inject_fault(Stage.SSL_REPLY)
    if stream.held_bytes:
        text = "Received unencrypted data after SSL request."
        raise LoginRefused(ErrorResponse.fatal("08P01", text))
    if not gateway.offers_tls:
        await stream.write(b"N")
        raise StreamEnded
    await stream.write(b"S" + gateway.early_bytes)
    await inject_fault(Stage.TLS)
    await stream.start_tls(gateway.certificates.context(gateway.certificate))
    return await _secure_packet(stream)


async def _plain_packet(stream: Stream) -> CancelRequest | None:
    """Read the first packet, in plaintext. Return a CancelRequest, or None for an SSLRequest."""
    prefix = await stream.read_exactly(8)
    length, code = _FIRST.unpack(prefix)
    if length >= STARTUP_BYTES_MAX:
        # A ClientHello, or garbage: read as a length and waited for, until the caller's timeout.
        await stream.wait_for_end()
        raise StreamEnded
    if prefix == SSLRequest().encode():
        return None
    if (length, code) == (_CANCEL_BYTES, _CANCEL_CODE):
        packet = parse_first_packet(prefix + await stream.read_exactly(length - 8))
        if isinstance(packet, CancelRequest):
            return packet
    raise LoginRefused(_invalid_version(code))


async def _secure_packet(stream: Stream) -> StartupMessage | CancelRequest:
    """Read the first packet inside TLS."""
    (length,) = _HEADER.unpack(prefix := await stream.read_exactly(4))
    if not 8 <= length < STARTUP_BYTES_MAX:
        raise LoginRefused(ErrorResponse.fatal("08006", "Invalid length of startup packet."))
    whole = prefix + await stream.read_exactly(length - 4)
    try:
        packet = parse_first_packet(whole)
    except ClientViolation as violation:
        error = ErrorResponse.fatal(violation.sqlstate, violation.message)
        raise LoginRefused(error) from violation
    if isinstance(packet, StartupMessage | CancelRequest):
        return packet
    raise LoginRefused(_invalid_version(_FIRST.unpack_from(whole)[1]))


def _invalid_version(code: int) -> ErrorResponse:
    return ErrorResponse.fatal("08P01", f"Invalid protocol version. Protocol version: {code}")
