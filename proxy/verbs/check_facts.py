"""What a check finds out by itself: whether the workspace's port answers, and a session's facts."""

import asyncio
import os
from typing import Final
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from proxy.config import Settings, UpstreamSettings
from proxy.config.validators import workspace_address
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.upstream_session import UpstreamSession
from proxy.wire.framing import MessageReader
from proxy.wire.messages import ParameterStatus, decode_backend

WORKSPACE_CONNECT_SECONDS_MAX: Final = 4.0
# A welcome is bounded by the upstream's machine; this is more.
_WELCOME_BYTES_MAX: Final = 1 << 20
_TRANSACTION_MODE: Final = (
    "transaction mode: no LISTEN, session SET, temporary tables, SQL PREPARE, session advisory "
    "locks or pg_dump"
)


def workspace_host(settings: Settings, target: UpstreamSettings) -> str:
    """Return the address of a target's workspace, "" if it is in a profile."""
    named = settings.workspace_of(target).host
    # A named workspace takes nothing from the environment.
    return named or ("" if target.workspace else os.environ.get("DATABRICKS_HOST", ""))


async def reach(workspace_host: str) -> None:
    """Connect to the workspace, or to the HTTP proxy before it, and close. Raises ProxyError.

    The SDK's own connection may take longer to fail. An address that cannot be parsed is left to
    what reads it for the SDK, which names its setting or variable.
    """
    try:
        where = _url(workspace_address(workspace_host))
        where_from, proxies = "", getproxies()
        if where.scheme in proxies and not proxy_bypass(where.hostname or ""):
            where_from, where = "the HTTP proxy ", _url(proxies[where.scheme])
        host, port = where.hostname or "", where.port or (443 if where.scheme == "https" else 80)
    except ValueError:
        return
    try:
        async with asyncio.timeout(WORKSPACE_CONNECT_SECONDS_MAX):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, UnicodeError) as error:  # a TimeoutError is an OSError
        reason = getattr(error, "strerror", None) or type(error).__name__
        detail = f"{where_from}{host}:{port}: {reason}"  # without a user and a password
        raise ProxyError(ErrorKind.API_UNREACHABLE, detail) from error
    writer.close()


def _url(text: str) -> SplitResult:
    return urlsplit(text if "://" in text else f"http://{text}")


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
