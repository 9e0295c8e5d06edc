"""The limit of open files, and what it allows: sessions, starting connections, cancels.

For: the bounds that follow from it, so that a full proxy still answers probes, forwards cancel
requests and calls the workspace. Not for: counting what is open.

The limit is that of one process; workers share the connections evenly. `FILES_RESERVED` of it are
kept for what is no session. Of the rest each session takes two. Up to `CANCELS_MAX` sessions have a
third one reserved: for the client's CancelRequest, or a connection that is starting. So with a
limit of 256 there are 47 sessions, and the cancel requests of all of them find a file while the
admin address has all of its connections. Clients beyond that are refused with 53000.
"""

import math
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from proxy.blocking import THREADS_MAX
from proxy.config import ListenSettings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.admin_access import CONNECTIONS_MAX
from proxy.observe.logs import get_logger
from proxy.session.cancel import FORWARDS_MAX
from proxy.session.listener import STARTING_MAX

FILES_A_SESSION: Final = 2
# Standard streams, the event loop, the log, listeners, sockets to workers, what libraries keep.
OWN_FILES: Final = 24
ADMIN_FILES: Final = CONNECTIONS_MAX + 1  # a new connection replaces one that is idle
API_FILES: Final = THREADS_MAX  # calls to the workspace at a time
# The upstream's side of cancel requests: forwarded so many at a time, the others wait some
# milliseconds for their turn.
FORWARDS_MIN: Final = 16
FILES_RESERVED: Final = OWN_FILES + ADMIN_FILES + API_FILES + FORWARDS_MIN
# The client's side of cancel requests that may come at the same moment.
CANCELS_MAX: Final = 100
STARTING_MIN: Final = 8  # even where the limit is below the reserve

_log = get_logger(__name__)


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one.

    A session takes two files. The usual soft limit of 1024 is for programs that use select().
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems report no limit and have one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _spare_files() -> float:
    """Return how many files a process has beside its reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if limit == resource.RLIM_INFINITY else limit - FILES_RESERVED


def slots_max(listen: ListenSettings) -> int:
    """Return how many sessions all processes may have: max_connections, or what the files allow."""
    spare = _spare_files()
    with_cancels = max(spare // (FILES_A_SESSION + 1), (spare - CANCELS_MAX) // FILES_A_SESSION)
    return int(min(listen.max_connections, max(1, with_cancels) * listen.workers))


def full_error(listen: ListenSettings) -> Callable[[], ProxyError]:
    """Return what makes the error for a client without a slot."""
    possible = slots_max(listen)
    if possible == listen.max_connections:
        return partial(ProxyError, ErrorKind.TOO_MANY_CONNECTIONS)
    detail = f"the proxy's limit of open files allows {possible} sessions"
    return partial(ProxyError, ErrorKind.TOO_FEW_FILES, detail)


def check_file_limit(listen: ListenSettings) -> None:
    """Warn if the limit of open files allows fewer clients than `max_connections`."""
    possible = slots_max(listen)
    if possible < listen.max_connections:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        each = math.ceil(listen.max_connections / listen.workers)
        _log.warning(
            "the limit of open files is too low for listen.max_connections",
            limit=limit,
            needed=FILES_A_SESSION * each + min(each, CANCELS_MAX) + FILES_RESERVED,
            max_connections=listen.max_connections,
            connections_possible=possible,
            hint="raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of"
            " a container), or lower listen.max_connections",
        )


def starting_max(listen: ListenSettings) -> int:
    """Return how many connections may be starting at a time in one process.

    They must leave files for the sessions, the admin address and the calls to the workspace.
    """
    return int(max(STARTING_MIN, min(STARTING_MAX, _files_beside_sessions(listen))))


def forwards_max(listen: ListenSettings) -> int:
    """Return how many cancel requests one process forwards at a time."""
    more = _files_beside_sessions(listen) - starting_max(listen)
    return int(min(FORWARDS_MAX, FORWARDS_MIN + max(0, more)))


def _files_beside_sessions(listen: ListenSettings) -> float:
    """Return the files that are left when each slot has a session."""
    sessions = math.ceil(slots_max(listen) / listen.workers)
    return _spare_files() - FILES_A_SESSION * sessions
