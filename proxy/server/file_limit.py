"""The limit of open files, and how many connections it allows.

For: the bounds that follow from it, so that a full proxy still answers probes, forwards cancel
requests and calls the workspace. Not for: counting what is open.

The limit is that of one process; workers share the connections evenly.
"""

import math
import resource
from contextlib import suppress
from typing import Final

from proxy.config import ListenSettings
from proxy.observe.logs import get_logger
from proxy.session.listener import STARTING_MAX

FILES_A_SESSION: Final = 2
# Listeners, the admin address's connections (64), calls to the workspace, cancel requests, and
# STARTING_MIN connections that are starting.
FILES_RESERVED: Final = 128
STARTING_MIN: Final = 32

_log = get_logger(__name__)


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one.

    A session takes two files. The usual soft limit of 1024 is for programs that use select().
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems report no limit and have one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def slots_max(listen: ListenSettings) -> int:
    """Return how many sessions all processes may have: max_connections, or what the files allow."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return listen.max_connections
    possible = max(1, (limit - FILES_RESERVED) // FILES_A_SESSION) * listen.workers
    return min(listen.max_connections, possible)


def full_detail(listen: ListenSettings) -> str:
    """Return the DETAIL for a client without a slot: the limit of open files is the bound."""
    possible = slots_max(listen)
    if possible == listen.max_connections:
        return ""
    return f"the proxy's limit of open files allows {possible} sessions"


def check_file_limit(listen: ListenSettings) -> None:
    """Warn if the limit of open files allows fewer clients than `max_connections`."""
    possible = slots_max(listen)
    if possible < listen.max_connections:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        each = math.ceil(listen.max_connections / listen.workers)
        _log.warning(
            "the limit of open files is too low for listen.max_connections",
            limit=limit,
            needed=FILES_A_SESSION * each + FILES_RESERVED,
            max_connections=listen.max_connections,
            connections_possible=possible,
            hint="raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of"
            " a container), or lower listen.max_connections",
        )


def starting_max(listen: ListenSettings) -> int:
    """Return how many connections may be starting at a time in one process.

    They must leave files for the sessions, the admin address and the calls to the workspace.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return STARTING_MAX
    sessions = math.ceil(slots_max(listen) / listen.workers)
    left = limit - FILES_A_SESSION * sessions - FILES_RESERVED
    return max(STARTING_MIN, min(STARTING_MAX, left))
