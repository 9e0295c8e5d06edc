"""The idle tracker in Python and the compiled one, as one object that demands that they agree."""

from typing import TYPE_CHECKING

from proxy import native
from proxy.wire.activity import Activity

if TYPE_CHECKING:
    from proxy.native.activity import Activity as CompiledActivity


class ActivityPair:
    """Takes the reads of a session as an Activity does, and feeds them to both objects.

    Where nothing was compiled it is Python's alone; `tests/native` says so loudly.
    """

    def __init__(self, *, walks_ahead: bool = False) -> None:
        self._all: list[Activity | CompiledActivity] = [Activity(walks_ahead=walks_ahead)]
        if native.AVAILABLE:
            self._all.append(native.activity.Activity(walks_ahead=walks_ahead))

    @property
    def idle(self) -> bool:
        return self._same("idle")

    @property
    def in_transaction(self) -> bool:
        return self._same("in_transaction")

    @property
    def terminated(self) -> bool:
        return self._same("terminated")

    @property
    def withheld(self) -> bool:
        return self._same("withheld")

    @property
    def reusable(self) -> bool:
        return self._same("reusable")

    @property
    def streaming(self) -> bool:
        return self._same("streaming")

    @property
    def awaits_answer(self) -> bool:
        return self._same("awaits_answer")

    @property
    def copying(self) -> bool:
        return self._same("copying")

    @property
    def reported(self) -> bytes | None:
        """The ParameterStatus messages so far."""
        first, *others = (tracker.reported for tracker in self._all)
        assert others in ([], [first])
        return first

    def client_ahead(self, data: bytes) -> bytes:
        first, *others = (tracker.client_ahead(data) for tracker in self._all)
        assert others in ([], [first])
        self._compare()
        return first

    def client_sent(self, data: bytes) -> None:
        for tracker in self._all:
            tracker.client_sent(data)
        self._compare()

    def upstream_sent(self, data: bytes) -> None:
        for tracker in self._all:
            tracker.upstream_sent(data)
        self._compare()

    def _same(self, name: str) -> bool:
        values = {getattr(tracker, name) for tracker in self._all}
        assert values in ({False}, {True}), name
        return values == {True}

    def _compare(self) -> None:
        assert self.reported is None or isinstance(self.reported, bytes)
        for name in (
            "idle",
            "terminated",
            "withheld",
            "reusable",
            "streaming",
            "awaits_answer",
            "copying",
        ):
            self._same(name)
