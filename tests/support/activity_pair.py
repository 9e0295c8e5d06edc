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

    def __init__(self) -> None:
        self._all: list[Activity | CompiledActivity] = [Activity()]
        if native.AVAILABLE:
            self._all.append(native.activity.Activity())

    @property
    def idle(self) -> bool:
        first, *others = (tracker.idle for tracker in self._all)
        assert others in ([], [first])
        return first

    @property
    def terminated(self) -> bool:
        first, *others = (tracker.terminated for tracker in self._all)
        assert others in ([], [first])
        return first

    @property
    def streaming(self) -> bool:
        first, *others = (tracker.streaming for tracker in self._all)
        assert others in ([], [first])
        return first

    @property
    def awaits_answer(self) -> bool:
        first, *others = (tracker.awaits_answer for tracker in self._all)
        assert others in ([], [first])
        return first

    @property
    def copying(self) -> bool:
        first, *others = (tracker.copying for tracker in self._all)
        assert others in ([], [first])
        return first

    def client_sent(self, data: bytes) -> None:
        for tracker in self._all:
            tracker.client_sent(data)
        self._compare()

    def upstream_sent(self, data: bytes) -> None:
        for tracker in self._all:
            tracker.upstream_sent(data)
        self._compare()

    def _compare(self) -> None:
        assert self.idle in (False, True)
        assert self.streaming in (False, True)
        assert self.terminated in (False, True)
        assert self.copying in (False, True)
        assert self.awaits_answer in (False, True)
