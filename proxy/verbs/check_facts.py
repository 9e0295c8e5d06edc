"""What a check finds out by itself: whether the workspace's port answers, and a session's facts."""

import asyncio
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.dialer import UpstreamSession
from proxy.wire.framing import MessageReader
from proxy.wire.messages import ParameterStatus, decode_backend

WORKSPACE_CONNECT_SECONDS_MAX: Final = 4.0
# A welcome is bounded by the upstream's machine; this is more.
_WELCOME_BYTES_MAX: Final = 1 << 20
_TRANSACTION_MODE: Final = (
    "transaction mode: no LISTEN, session SET, temporary tables, SQL PREPARE, session advisory "
    "locks or pg_dump"
)


async def reach(workspace_host: str) -> None:
    """Connect to the workspace and close. Raises ProxyError if that fails.

    The SDK tries a port that refuses again until its time is over. Through an HTTP proxy it is the
    SDK's own connection that counts.
    """
    where = urlsplit(workspace_host if "://" in workspace_host else f"https://{workspace_host}")
    host = where.hostname or ""
    if where.scheme in getproxies() and not proxy_bypass(host):
        return
    try:
        port = where.port or (443 if where.scheme == "https" else 80)
        async with asyncio.timeout(WORKSPACE_CONNECT_SECONDS_MAX):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, ValueError, UnicodeError) as error:  # a TimeoutError is an OSError
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ProxyError(ErrorKind.API_UNREACHABLE, f"{where.netloc}: {reason}") from error
    writer.close()


def upstream_facts(session: UpstreamSession) -> str:
    """Return what a session says of its upstream."""
    target, transport = session.target, session.stream.transport
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert() or {}
    pooled = f"; pooled host, {_TRANSACTION_MODE}" if target.pooled else ""
    return (
        f"{target.host}:{target.port} at {transport.get_extra_info('peername')[0]}, "
        f"{tls.version()}, certificate valid until {certificate.get('notAfter', 'unknown')}, "
        f"PostgreSQL {_server_version(session)}{pooled}"
    )


def _server_version(session: UpstreamSession) -> str:
    reader = MessageReader(_WELCOME_BYTES_MAX)
    reader.feed(session.startup.welcome(None))
    while (frame := reader.next()) is not None:
        match decode_backend(frame):
            case ParameterStatus(b"server_version", value):
                return value.decode("utf-8", "replace")
    return "unknown"
