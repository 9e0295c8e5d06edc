"""The client of a running proxy's admin address.

For: `wait`, `shutdown`, `reconnect`, `reload` and `status`, in images without a shell or curl, and
as a container's health check. Not for: anything that the admin address does not offer.

Invariant: it connects to loopback or the configured address, never through an HTTP proxy, and every
request has a timeout.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlencode

from proxy.addresses import address_of
from proxy.config import AdminSettings, ConfigurationError, Problem

# The proxy answers from memory; an answer that takes longer counts as none.
REQUEST_SECONDS_MAX: Final = 2.0
# A reload answers within the time of a connection, whether or not it is done by then.
RELOAD_SECONDS_MAX: Final = 10.0
# A search for processes takes a second or two.
SESSIONS_SECONDS_MAX: Final = 5.0
POLL_SECONDS: Final = 0.1
# A proxy that is ready may have no token yet, and then no client can log in.
_READY_PATHS: Final = ("/readiness", "/startup")
_STATUS: Final = "/status"
_SESSIONS: Final = "/sessions"
_SESSIONS_PAGE: Final = 500  # the most that a page has
_ANSWER_BYTES_MAX: Final = 1 << 20


class AdminError(Exception):
    """The proxy did not do what it was asked for. The text says why and what to do."""


def wait_until_ready(
    settings: AdminSettings,
    timeout_seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return as soon as the proxy is ready. Asks at least once, and for `timeout_seconds`.

    Raises AdminError if it is not ready in time, and ConfigurationError if the settings have no
    admin address.
    """
    ends_at = clock() + timeout_seconds
    while (why := _why_not_ready(settings)) is not None:
        if clock() >= ends_at:
            raise AdminError(f"not ready within {timeout_seconds:g} seconds: {why}")
        sleep(POLL_SECONDS)


def ask_to_drain(settings: AdminSettings) -> None:
    """Ask the proxy to drain and end, as SIGTERM does. Return when it has accepted.

    Raises AdminError if it refuses, and ConfigurationError as `wait_until_ready` does.
    """
    refused = "start it with --admin.quit true, and ask from loopback"
    _post(settings, "/quitquitquit", {403: refused, 404: refused})


def ask_to_reconnect(settings: AdminSettings) -> None:
    """Ask the proxy to retire every pooled session. Return when it has done so.

    Raises AdminError if it does not, and ConfigurationError as `wait_until_ready` does.
    """
    _post(settings, "/reconnect", {403: "ask from loopback"})


def ask_to_reload(settings: AdminSettings) -> dict[str, Any]:
    """Ask the proxy to read its configuration again. Return what became of it: its JSON answer.

    Raises AdminError if there is none, and ConfigurationError as `wait_until_ready` does.
    """
    return _json_of(settings, "result", *_answer(settings, "POST", "/reload", RELOAD_SECONDS_MAX))


def fetch_status(settings: AdminSettings) -> dict[str, Any]:
    """Return what `/status` shows. Raises as `ask_to_reload` does."""
    return _fetched(settings, _STATUS, "state")


def fetch_sessions(settings: AdminSettings, *, processes: bool) -> Iterator[dict[str, Any]]:
    """Yield every open connection, as `/sessions` shows it. Raises as `ask_to_reload` does."""
    after: int | None = 0
    while after is not None:
        query = {"after": after, "limit": _SESSIONS_PAGE} | ({"processes": 1} if processes else {})
        path = f"{_SESSIONS}?{urlencode(query)}"
        page = _fetched(settings, path, "sessions", SESSIONS_SECONDS_MAX)
        yield from page["sessions"]
        after = page.get("next")


def ask_to_end(settings: AdminSettings, number: int) -> None:
    """Ask the proxy to end a session. Return when it has begun to.

    Raises AdminError if it refuses, and ConfigurationError as `wait_until_ready` does.
    """
    refused = f"there is no session {number}, or the proxy runs without --admin.quit true"
    refusals = {403: "ask from loopback", 404: refused, 405: refused}
    _post(settings, f"{_SESSIONS}/{number}", refusals, "DELETE")


def _fetched(
    settings: AdminSettings, path: str, name: str, seconds_max: float = REQUEST_SECONDS_MAX
) -> dict[str, Any]:
    status, body = _answer(settings, "GET", path, seconds_max)
    if status != 200:
        raise _no_proxy(settings, status)
    return _json_of(settings, name, status, body)


def _post(
    settings: AdminSettings, path: str, refusals: Mapping[int, str], method: str = "POST"
) -> None:
    """Ask for a change. Raises AdminError; `refusals` has what to do by the answer's status."""
    status, body = _answer(settings, method, path)
    if status in refusals:
        raise AdminError(f"the proxy refuses: {refusals[status]}")
    if status == 503:
        raise AdminError(body.decode(errors="replace").strip())
    if not 200 <= status < 300:
        raise AdminError(f"{_shown(settings)} answers {status}: is that the proxy?")


def look_up(settings: AdminSettings, key: str) -> dict[str, Any]:
    """Return what the proxy knows of a shard key: its JSON answer.

    Raises AdminError if there is none, and ConfigurationError as `wait_until_ready` does.
    """
    return _fetched(settings, "/lookup?" + urlencode({"key": key}), "ok")


def _answer(
    settings: AdminSettings, method: str, path: str, seconds_max: float = REQUEST_SECONDS_MAX
) -> tuple[int, bytes]:
    """Return status code and body of the answer. Raises AdminError if there is none."""
    try:
        return _ask(settings, method, path, seconds_max)
    except OSError as error:
        raise AdminError(f"no proxy answers on {_shown(settings)}: {_reason(error)}") from error


def _json_of(settings: AdminSettings, name: str, status: int, body: bytes) -> dict[str, Any]:
    """Return the JSON object of an answer. Raises AdminError if it is none that has this name."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or name not in answer:
        raise _no_proxy(settings, status)
    return answer


def _no_proxy(settings: AdminSettings, status: int) -> AdminError:
    text = f"{_shown(settings)} answers {status}: is that the proxy, on this machine?"
    return AdminError(text)


def running_proxy(settings: AdminSettings) -> str:
    """Return whether a proxy runs, as far as its admin address says."""
    if not settings.enabled or not settings.port:
        return "no admin address to ask whether a proxy runs"
    try:
        status = _status(settings, "GET", "/readiness")
    except OSError:
        return "no proxy runs"
    return f"a proxy runs and is {'ready' if status == 200 else 'not ready'}"


def _why_not_ready(settings: AdminSettings) -> str | None:
    """Return why the proxy is not ready, or None if it is."""
    for path in _READY_PATHS:
        try:
            status = _status(settings, "GET", path)
        except OSError as error:
            return f"nothing answers on {_shown(settings)} ({_reason(error)})"
        if status != 200:
            return f"{_shown(settings)}{path} answers {status}; its log and {_STATUS} say why"
    return None


def _status(settings: AdminSettings, method: str, path: str) -> int:
    """Return the status code of the answer. Raises OSError if there is none."""
    return _ask(settings, method, path)[0]


def _ask(
    settings: AdminSettings, method: str, path: str, seconds_max: float = REQUEST_SECONDS_MAX
) -> tuple[int, bytes]:
    """Return status code and body of the answer. Raises OSError if there is none."""
    host, port = _address(settings)
    connection = http.client.HTTPConnection(host, port, timeout=seconds_max)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read(_ANSWER_BYTES_MAX)
    except http.client.HTTPException as error:
        raise OSError(f"not HTTP: {type(error).__name__}") from error
    finally:
        connection.close()


def _address(settings: AdminSettings) -> tuple[str, int]:
    if not settings.enabled:
        problem = Problem("admin.enabled", "must be true: this verb asks the admin address")
        raise ConfigurationError([problem])
    if not settings.port:
        problem = Problem("admin.port", "must not be 0: this verb needs to know the port")
        raise ConfigurationError([problem])
    return _reachable(settings.host), settings.port


def _reachable(host: str) -> str:
    """Return where to reach a server that listens on `host`: loopback, if on all addresses."""
    address = address_of(host)
    if address is None or not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


def _shown(settings: AdminSettings) -> str:
    host = _reachable(settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
