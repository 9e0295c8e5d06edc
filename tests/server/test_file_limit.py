"""The limit of open files: how many sessions, starting connections and cancels it carries."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from proxy.config import ListenSettings
from proxy.server.file_limit import (
    CANCELS_MAX,
    FILES_RESERVED,
    FORWARDS_MIN,
    STARTING_MIN,
    check_file_limit,
    forwards_max,
    full_error,
    slots_max,
    starting_max,
)
from proxy.session.cancel import FORWARDS_MAX
from proxy.session.listener import STARTING_MAX
from tests.support.running import captured_log

TEN = ListenSettings(max_connections=10)


@contextmanager
def limited(files_max: int) -> Iterator[None]:
    """Run the block with this limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and files_max > hard:
        pytest.skip(f"needs {files_max} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("files_max", "slots", "starting", "forwards"),
    [
        (FILES_RESERVED - 1, 1, STARTING_MIN, FORWARDS_MIN),  # it cannot be kept
        # Three for each session: its two, and one for its cancel request.
        (FILES_RESERVED + 29, 9, 11, FORWARDS_MIN),
        (FILES_RESERVED + 30, 10, 10, FORWARDS_MIN),
        (FILES_RESERVED + 31, 10, 11, FORWARDS_MIN),
        (256, 47, 49, FORWARDS_MIN),
        # Cancel requests have CANCELS_MAX files, however many sessions there are.
        (FILES_RESERVED + 3 * CANCELS_MAX - 1, 99, 101, FORWARDS_MIN),
        (FILES_RESERVED + 3 * CANCELS_MAX, 100, 100, FORWARDS_MIN),
        (FILES_RESERVED + 3 * CANCELS_MAX + 1, 100, 101, FORWARDS_MIN),
        (FILES_RESERVED + 3 * CANCELS_MAX + 2, 101, 100, FORWARDS_MIN),
        (1024, 405, 101, FORWARDS_MIN),
        (FILES_RESERVED + 2000 + STARTING_MAX + 1, 1000, STARTING_MAX, FORWARDS_MIN + 1),
        (8192, 1000, STARTING_MAX, FORWARDS_MAX),
    ],
)
def test_the_files_are_divided(files_max: int, slots: int, starting: int, forwards: int) -> None:
    # A thousand might start, and a hundred cancels be forwarded, whatever the limit: they took the
    # files of probes and sessions.
    listen = ListenSettings(max_connections=1000)
    with limited(files_max):
        assert (slots_max(listen), starting_max(listen)) == (slots, starting)
        assert forwards_max(listen) == forwards
        used = FILES_RESERVED - FORWARDS_MIN + 2 * slots + starting + forwards
    assert used <= files_max or slots == 1


def test_each_worker_has_the_limit_for_itself() -> None:
    with limited(256):
        assert slots_max(ListenSettings(max_connections=1000, workers=2)) == 94
        assert starting_max(ListenSettings(max_connections=1000, workers=2)) == 49


@pytest.mark.parametrize(("more", "warned"), [(29, True), (30, False)])
def test_a_limit_below_max_connections_is_a_warning_with_numbers(more: int, warned: bool) -> None:
    files_max = FILES_RESERVED + more
    with limited(files_max), captured_log() as log:
        check_file_limit(TEN)
    assert len(log.above_info()) == warned
    for line in log.above_info():
        needed = FILES_RESERVED + 30
        assert (line["limit"], line["needed"], line["connections_possible"]) == (
            files_max,
            needed,
            9,
        )
        assert "ulimit -Hn" in line["hint"]


@pytest.mark.parametrize(("more", "sqlstate"), [(29, "53000"), (30, "53300")])
def test_a_client_without_a_slot_is_told_which_limit_it_met(more: int, sqlstate: str) -> None:
    with limited(FILES_RESERVED + more):
        response = full_error(TEN)().response()
    assert response.sqlstate == sqlstate
    detail = "reason=out_of_resources the proxy's limit of open files allows 9 sessions"
    assert response.text(b"D") == (detail if more == 29 else "reason=too_many_connections")
