"""Asking a running proxy, over its admin address, from another process.

For: `wait` and `shutdown`, in images without a shell or curl, and as a container's health check.
Not for: anything that the admin address does not say.

Invariant: it asks loopback or the configured address, never through an HTTP proxy, and every
request has a bound.
"""

import http.client
import time
from collections.abc import Callable
from typing import Final

from proxy.addresses import address_of
from proxy.config import AdminSettings, ConfigurationError, Problem

# An answer comes from memory: one that takes longer is as good as none.
REQUEST_SECONDS_MAX: Final = 2.0
ASK_AGAIN_SECONDS: Final = 0.1


class AdminError(Exception):
    """The proxy does not do what it was asked for; the text says why and what to do."""


def wait_until_ready(
    settings: AdminSettings,
    timeout_seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return as soon as the proxy is ready; ask at least once, then for `timeout_seconds`.

    Raises AdminError when it is not ready in time, and ConfigurationError when the settings name no
    address to ask.
    """
    ends_at = clock() + timeout_seconds
    while (why := _why_not_ready(settings)) is not None:
        if clock() >= ends_at:
            raise AdminError(f"not ready within {timeout_seconds:g} seconds: {why}")
        sleep(ASK_AGAIN_SECONDS)


def ask_to_drain(settings: AdminSettings) -> None:
    """Have the proxy drain and end, as SIGTERM does. Returns when it has said yes.

    Raises AdminError when it does not, and ConfigurationError as `wait_until_ready`.
    """
    try:
        status = _status(settings, "POST", "/quitquitquit")
    except OSError as error:
        raise AdminError(f"no proxy answers on {_shown(settings)}: {_reason(error)}") from error
    if status in (403, 404):
        text = "the proxy does not take it: start it with --admin.quit true, and ask from loopback"
        raise AdminError(text)
    if not 200 <= status < 300:
        raise AdminError(f"{_shown(settings)} answers {status}: is that the proxy?")


def _why_not_ready(settings: AdminSettings) -> str | None:
    """Return what keeps the proxy from being ready; None when it is."""
    try:
        status = _status(settings, "GET", "/readiness")
    except OSError as error:
        return f"nothing answers on {_shown(settings)} ({_reason(error)})"
    return None if status == 200 else f"{_shown(settings)} answers {status}"


def _status(settings: AdminSettings, method: str, path: str) -> int:
    """Return the answer's status code. Raises OSError when there is none."""
    host, port = _address(settings)
    connection = http.client.HTTPConnection(host, port, timeout=REQUEST_SECONDS_MAX)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise OSError(f"not HTTP: {type(error).__name__}") from error
    finally:
        connection.close()


def _address(settings: AdminSettings) -> tuple[str, int]:
    if not settings.enabled:
        problem = Problem("admin.enabled", "must be true: the admin address is what is asked")
        raise ConfigurationError([problem])
    if not settings.port:
        problem = Problem("admin.port", "must be a number: with 0 nobody knows where to ask")
        raise ConfigurationError([problem])
    return _reachable(settings.host), settings.port


def _reachable(host: str) -> str:
    """Return where to ask a server that listens on `host`: on all addresses, that is loopback."""
    address = address_of(host)
    if address is None or not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


def _shown(settings: AdminSettings) -> str:
    host = _reachable(settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
