"""What is the same for a long time of a running proxy: processes, roles, configuration.

For: `/status`, and the end of the page. Not for: finding it out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from proxy.observe.recent_errors import iso_time


@dataclass(frozen=True, slots=True)
class Configuration:
    """Where the configuration came from, and what became of the last attempt to reload it.

    `file` is empty without one. `reloaded_at` is in seconds since 1970, None before the first
    attempt; `result` is its word.
    """

    file: str = ""
    reloaded_at: float | None = None
    result: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """The processes that serve sessions, of those that are configured; roles; configuration.

    `roles` are those that sessions log in as, so far as they are known; "*" is each client's own.
    """

    workers: int = 1
    workers_serving: int = 1
    roles: Sequence[str] = ()
    configuration: Configuration = Configuration()

    def as_dict(self) -> Mapping[str, object]:
        """Return it as values that JSON has, with times in UTC."""
        at = self.configuration.reloaded_at
        shown = asdict(self)
        shown["configuration"]["reloaded_at"] = None if at is None else iso_time(at)
        return shown
