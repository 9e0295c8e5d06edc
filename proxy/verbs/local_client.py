"""An ordinary driver as a client of this process's own listener, as an application would be one.

For: `check` and `exec`, which must know that an application can log in. Not for: the upstream.

Invariant: nothing is taken from the environment, where PGHOST and the like mean the upstream.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import asyncpg

from proxy.errors import ErrorKind, ProxyError
from proxy.server.app import App
from proxy.session.private_listener import LOCAL_DRIVER
from proxy.wire.messages import ErrorResponse

_REASON: Final = re.compile(r"reason=(\w+) ?")


async def log_in(
    app: App,
    user: str,
    database: str,
    timeout_seconds: float,
    parameters: Mapping[str, str] | None = None,
) -> Any:
    """Return asyncpg's connection to the listener. Raises ProxyError.

    `parameters` are sent in the StartupMessage. An empty database is the target's own: without one
    the driver would send the user's name.
    """
    try:
        return await asyncpg.connect(
            host=app.listen_host,
            port=app.listen_port,
            user=user,
            database=database,
            timeout=timeout_seconds,
            server_settings=dict(parameters or {}),
            statement_cache_size=0,
            **LOCAL_DRIVER,
        )
    except asyncpg.PostgresError as error:
        raise error_received(error) from error
    except (asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise failed(error) from error


def error_received(error: asyncpg.PostgresError) -> ProxyError:
    """Return the error that the driver received, from the proxy or from the database."""
    detail, hint = error.detail or "", error.hint or ""
    response = ErrorResponse.fatal(error.sqlstate or "", error.message, detail, hint)
    found = _REASON.match(detail)
    word = found[1] if found else ErrorKind.STARTUP_REFUSED.value.reason
    kinds = (kind for kind in ErrorKind if kind.value.reason == word)
    kind = next(kinds, ErrorKind.STARTUP_REFUSED)
    return ProxyError(kind, _REASON.sub("", detail, count=1), original=response)


def failed(error: Exception) -> ProxyError:
    """Return the error for a connection that failed without an answer."""
    return ProxyError(ErrorKind.STARTUP_REFUSED, f"{type(error).__name__}: {error}")
