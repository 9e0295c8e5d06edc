"""Notifications of the catalogue: what each says, and whether one is missing.

For: the text of a notification, and the sequence of a map's versions. Pure. Not for: reading what
changed (`feed`). Any login of the database can send a notification, so that none is believed more
than that something may have changed.
"""

import json
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

# Ids that are read one by one; for more the whole map is read.
PENDING_IDS_MAX: Final = 10_000
# PostgreSQL's own bound of a payload.
PAYLOAD_BYTES_MAX: Final = 8000


@dataclass(frozen=True, slots=True)
class Notification:
    """A change of a map, which took it to `version`. None: it is not said what changed."""

    map_id: UUID
    version: int
    mapping_ids: tuple[UUID, ...] | None = None
    shard_ids: tuple[UUID, ...] | None = None


def parse(payload: str) -> Notification | None:
    """Return what a payload says; None if it is none of ours."""
    try:
        if len(payload) > PAYLOAD_BYTES_MAX:
            return None
        found = json.loads(payload)
        version = found["v"]
        if type(version) is not int or version < 1:
            return None
        return Notification(UUID(found["m"]), version, _ids(found.get("ids")), _ids(found.get("s")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _ids(found: object) -> tuple[UUID, ...] | None:
    if found is None:
        return None
    if not isinstance(found, list):
        raise TypeError("ids are a list")
    return tuple(UUID(one) for one in found)


@dataclass(slots=True)
class Pending:
    """What has changed since the map was last brought up to date, by the notifications."""

    version: int
    """The last version that was seen."""
    mapping_ids: set[UUID] = field(default_factory=set)
    shards_changed: bool = False
    reload: bool = False
    """Whether something is missing, so that the whole map is to be read."""
    gaps: int = 0

    read_version: int = field(init=False)
    """The version that was read in the catalogue: what is notified of it is known."""

    def __post_init__(self) -> None:
        self.read_version = self.version

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return self.reload or self.shards_changed or bool(self.mapping_ids)

    def add(self, found: Notification) -> None:
        """Take a notification of this map.

        A version that comes a second time is a gap: one of the two was forged.
        """
        if found.version <= self.read_version:
            return
        is_next = found.version == self.version + 1
        self.version = max(self.version, found.version)
        says_what = found.mapping_ids is not None or found.shard_ids is not None
        if not is_next or not says_what:
            self.gaps += 1
            self.reload = True
            return
        self.mapping_ids.update(found.mapping_ids or ())
        self.shards_changed = self.shards_changed or found.shard_ids is not None
        if len(self.mapping_ids) > PENDING_IDS_MAX:
            self.reload = True
            self.mapping_ids.clear()

    def taken(self) -> "Pending":
        """Return this, and begin anew."""
        taken = Pending(
            self.version, set(self.mapping_ids), self.shards_changed, self.reload, self.gaps
        )
        self.mapping_ids.clear()
        self.shards_changed = self.reload = False
        self.gaps = 0
        return taken
