"""When the map is written to its snapshot file, and read from there.

For: a restore before the first contact with the catalogue, and a copy after changes. Not for: the
form of the file (`snapshot_file`).

Invariant: reading and writing are in a thread, and a file that cannot be used or written is a
warning, never a reason to stop.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from proxy.blocking import BlockingCalls
from proxy.catalogue.cache import Build
from proxy.catalogue.map_state import Change, MapState
from proxy.catalogue.model import CatalogueMap
from proxy.catalogue.snapshot_file import (
    CataloguePlace,
    SavedMap,
    SnapshotUnusable,
    opened,
    write,
)
from proxy.errors import ProxyError
from proxy.observe.logs import get_logger

# A map of a million mappings is a file of some 60 MB.
WRITE_PAUSE_SECONDS: Final = 10.0
READ_SECONDS_MAX: Final = 60.0
WRITE_SECONDS_MAX: Final = 60.0
LAST_WRITE_SECONDS_MAX: Final = 5.0

# What a file can be the cause of, whatever is in it.
_UNUSABLE: Final = (
    *(SnapshotUnusable, ProxyError, OSError, TimeoutError, RuntimeError),
    *(ValueError, TypeError, LookupError, ArithmeticError, MemoryError),
)

_log = get_logger(__name__)


class SnapshotKeeper:
    """Keeps the file of one map."""

    def __init__(
        self,
        file: str,
        catalogue: CataloguePlace,
        state: MapState,
        check: Callable[[CatalogueMap], None],
    ) -> None:
        """`check` raises ProxyError for a map that is not as it is configured."""
        self._path = Path(file)
        self._catalogue = catalogue
        self._state = state
        self._check = check
        self._threads = BlockingCalls("map-snapshot", threads_max=1)
        self._changed = asyncio.Event()
        self._written_version = 0
        self._unsubscribe = state.subscribe(self._note)

    def _note(self, _change: Change) -> None:
        self._changed.set()

    async def restore(self) -> bool:
        """Take the map from the file. Return whether that was possible."""
        try:
            found = await self._threads.run(self._read, READ_SECONDS_MAX)
        except FileNotFoundError:
            return False
        except _UNUSABLE as error:
            self._warn("the snapshot of the shard map is not used", error)
            return False
        saved, build = found
        self._state.restore(saved.map, build, saved.shards)
        self._changed.clear()  # the file has it
        self._written_version = saved.map.version
        return True

    def _read(self) -> tuple[SavedMap, Build]:
        """Return what is in the file. Raises what `opened` does, and ProxyError."""
        with opened(self._path, self._catalogue, self._state.name) as (saved, chunks):
            self._check(saved.map)
            build = Build(saved.map.map_id, saved.map.spec)
            for chunk in chunks:
                build.append(chunk)
        for _ in build.steps():
            pass
        return saved, build

    async def run(self) -> None:
        """Write the file after changes, once in a while, until the task is cancelled."""
        while True:
            await self._changed.wait()
            await self._write(WRITE_SECONDS_MAX)
            await self._state.times.sleep(WRITE_PAUSE_SECONDS)

    async def close(self) -> None:
        """Write what has changed since the last time."""
        self._unsubscribe()
        if self._changed.is_set() or self._state.read_version != self._written_version:
            await self._write(LAST_WRITE_SECONDS_MAX)

    async def _write(self, seconds_max: float) -> None:
        self._changed.clear()
        state = self._state
        if state.map is None or state.cache is None or not state.loaded.is_set():
            return
        self._written_version = state.read_version
        found = replace(state.map, version=state.read_version)
        saved = SavedMap(self._catalogue, found, tuple(state.cache.shards.values()))
        chunks = state.cache.chunks()
        try:
            await self._threads.run(lambda: write(self._path, saved, chunks), seconds_max)
        except asyncio.CancelledError:
            self._changed.set()  # it may not be written
            raise
        except (OSError, TimeoutError, RuntimeError) as error:
            self._warn("the snapshot of the shard map cannot be written", error)

    def _warn(self, text: str, error: BaseException) -> None:
        _log.warning(text, file=str(self._path), error=str(error) or type(error).__name__)
