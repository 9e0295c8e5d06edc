"""Whether a proxy is well, in a sentence: what an operator reads first.

For: `/status` and the top of the page. Not for: probes, which restart a pod (`admin`): most of what
this reports is no reason to.

Invariant: it has only words from closed lists and names from the configuration.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum, unique

from proxy.errors import ErrorKind
from proxy.observe.recent_errors import QUIET_SECONDS, iso_time
from proxy.observe.status import Status

_REASONS_SHOWN = 3
_KNOWN_REASONS = frozenset(kind.value.reason for kind in ErrorKind)


@unique
class Level(StrEnum):
    """How well it is."""

    WELL = "well"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Health:
    """How well a proxy is: in a sentence, since when (seconds since 1970), and for which reason.

    `documented` says whether the page has a row for the reason.
    """

    level: Level
    text: str
    since: float | None = None
    reason: str = ""

    def as_dict(self) -> Mapping[str, object]:
        """Return it as values that JSON has, with times in UTC."""
        since = None if self.since is None else iso_time(self.since)
        return asdict(self) | {"since": since, "documented": self.reason in _KNOWN_REASONS}


def health_of(status: Status) -> Health:
    """Return the first of what is wrong, or that nothing is."""
    serving = f"Serving {_count(status.sessions, 'session')}."
    api = next((each for each in status.workspace_apis if each.reason), None)
    if status.drain.draining:
        seconds = status.drain.seconds_left or 0.0
        left = _count(status.sessions, "session")
        return Health(Level.WARNING, f"Draining: {left} left, to be cut in {seconds:.0f} s.")
    if api is not None:
        source = "password file" if "password_file" in api.workspace else f"API of {api.workspace}"
        text = f"{serving} The {source} fails: {api.reason}."
        return Health(Level.BAD, text, api.failing_since, api.reason)
    if status.last_minute.errors:
        return _failing(status, serving)
    if status.state == "starting":
        return Health(Level.WARNING, "Starting.")
    return _limited(status, serving) or Health(Level.WELL, serving)


def _failing(status: Status, serving: str) -> Health:
    """Return what failed in the last minute; it is worse if no session has started meanwhile."""
    last = status.last_minute
    reasons = list(last.errors)
    if last.refused:
        failures = _count(last.refused, "refusal")
    else:
        failures = _count(sum(last.errors.values()), "failure")
    level, text = Level.WARNING, f"{serving} {failures} in the last minute: {_list(reasons)}."
    if last.refused and not last.started:
        level, text = Level.BAD, f"{text} No session has started meanwhile."
    recent = (each for each in status.errors if status.at - each.at < QUIET_SECONDS)
    since = min((each.since for each in recent if each.reason in reasons), default=None)
    return Health(level, text, since, reasons[0])


def _limited(status: Status, serving: str) -> Health | None:
    """Return what limits a proxy that refuses no client yet; None if nothing does."""
    facts = status.facts
    if status.sessions + status.sessions_opening >= status.sessions_max:
        return Health(Level.WARNING, f"{serving} No more are possible: listen.max_connections.")
    if facts.workers_serving < facts.workers:
        workers = f"{facts.workers_serving} of {facts.workers} workers serve."
        return Health(Level.WARNING, f"{serving} {workers}")
    shard_map = status.shard_map
    if shard_map is not None and (shard_map.state != "ready" or shard_map.feed == "down"):
        return Health(Level.WARNING, f"{serving} The shard map {shard_map.name} is not current.")
    return None


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _list(reasons: Iterable[str]) -> str:
    first = list(reasons)
    more = len(first) - _REASONS_SHOWN
    return ", ".join(first[:_REASONS_SHOWN]) + (f" and {more} more" if more > 0 else "")
