"""What the admin address shows of a proxy, and what it asks of it.

For: the seam between HTTP (`admin`) and the proxy (`server.app`). Not for: either of both.
"""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final, Protocol

from proxy.observe.history import History
from proxy.observe.metrics import Metrics
from proxy.observe.session_page import SessionPage
from proxy.observe.status import LifecycleStatus, Status


@unique
class ReloadResult(StrEnum):
    """What became of a request to reload."""

    RELOADED = "reloaded"
    REFUSED = "refused"  # the configuration is not valid
    FAILED = "failed"  # it took too long, a worker did not take it, or a bug
    PENDING = "pending"  # it goes on
    NOT_SERVING = "not_serving"  # the proxy is not up yet, or drains


@dataclass(frozen=True, slots=True)
class ReloadOutcome:
    """What a reload has changed, in dotted keys, or why it has not."""

    result: ReloadResult
    changed: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    """The keys whose change waits for a restart."""
    problems: tuple[str, ...] = ()


NOT_SERVING: Final = ReloadOutcome(
    ReloadResult.NOT_SERVING, problems=("the proxy does not serve yet, drains, or is a demo",)
)


ReloadConfiguration = Callable[[], Coroutine[None, None, ReloadOutcome]]


async def not_serving() -> ReloadOutcome:
    """Return what became of a request to reload before there is what reloads."""
    return NOT_SERVING


class AdminState(Protocol):
    """What the admin address shows of a proxy, and what it asks of it.

    Every member that is no coroutine function answers at once, from memory.
    """

    @property
    def lifecycle(self) -> LifecycleStatus:
        """Whether the proxy starts, serves or drains."""

    @property
    def started(self) -> bool:
        """Whether the proxy has started; once true it stays so."""

    @property
    def ready(self) -> bool:
        """Whether the proxy serves and does not drain."""

    @property
    def metrics(self) -> Metrics:
        """The counters of errors of the admin address itself."""

    async def refresh(self) -> None:
        """Fetch what the proxy's other processes have counted, for `exposition` and `status`."""

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus's text format."""

    def status(self) -> Status:
        """Return what `/status` shows."""

    @property
    def history(self) -> History:
        """The last minutes, for `/history`."""

    def look_up(self, key: str) -> Mapping[str, object]:
        """Return where a shard key leads as far as the proxy knows; nothing is asked for it.

        Raises ProxyError.
        """

    async def reconnect(self) -> bool:
        """Retire every pooled session in all processes. Return whether each has done so."""

    async def sessions(self, after: int, limit: int, *, processes: bool) -> SessionPage:
        """Return open connections of all processes whose id is higher than `after`.

        With `processes` those that connected are looked for, where the kernel knows them.
        """

    async def end_session(self, number: int) -> bool:
        """End the connection that has this id. Return whether there is one."""

    async def reload_configuration(self) -> ReloadOutcome:
        """Read the configuration again, as SIGHUP does. Return what became of it."""

    def quit(self) -> None:
        """Ask the proxy to drain and end."""
