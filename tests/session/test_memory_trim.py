"""Memory of ended sessions: released after many ends, when sessions pause, and not all the time."""

import asyncio
import ctypes
import gc
import weakref
from pathlib import Path

import pytest

from proxy.session.memory_trim import SESSIONS_MIN, MemoryTrim, release_memory
from tests.support.running import eventually


async def test_memory_is_given_back_once_after_many_ends_and_not_after_a_few() -> None:
    few: list[int] = []
    given = asyncio.Event()
    of_few, of_many = MemoryTrim(lambda: few.append(1)), MemoryTrim(given.set)
    for _ in range(SESSIONS_MIN - 1):
        of_few.session_ended()
        of_many.session_ended()
    of_many.session_ended()
    assert not given.is_set()  # not in the midst of the ends
    async with asyncio.timeout(10):
        await given.wait()
    assert not few


async def test_ends_without_a_pause_do_not_keep_memory_from_being_released() -> None:
    given: list[int] = []
    memory_trim = MemoryTrim(lambda: given.append(1), release_seconds_max=0.5)
    loop = asyncio.get_running_loop()

    def end_some() -> None:
        for _ in range(SESSIONS_MIN):
            memory_trim.session_ended()
        if len(given) < 2:
            loop.call_soon(end_some)

    end_some()
    await eventually(lambda: len(given) >= 2, "released twice")
    memory_trim.close()


async def test_nothing_is_given_back_once_closed() -> None:
    closed: list[int] = []
    given = asyncio.Event()
    first, second = MemoryTrim(lambda: closed.append(1)), MemoryTrim(given.set)
    for _ in range(SESSIONS_MIN):
        first.session_ended()
        second.session_ended()
    first.close()
    async with asyncio.timeout(10):
        await given.wait()
    assert not closed


class _Knot:
    """An object in a reference cycle, as a relay's directions are."""

    def __init__(self) -> None:
        self.itself = self


def test_what_knows_itself_is_freed() -> None:
    gc.disable()
    try:
        knot = weakref.ref(_Knot())
        assert knot() is not None
        release_memory()
        assert knot() is None
    finally:
        gc.enable()


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="measured in /proc, and done by glibc alone",
)
def test_what_is_free_between_what_lives_goes_back_to_the_system() -> None:
    pieces = [bytearray(b"x" * 40_000) for _ in range(2000)]
    del pieces[1::2]
    before = _resident_pages()
    release_memory()
    assert (before - _resident_pages()) * 4096 > 20_000_000
    assert len(pieces) == 1000


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])
