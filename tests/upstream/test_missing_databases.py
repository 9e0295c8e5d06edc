"""Databases that do not exist: remembered for a minute, and not without bound."""

from proxy.upstream.missing_databases import KEPT_SECONDS, NAMES_MAX, MissingDatabases
from tests.support.fake_clock import FakeClock


def test_a_name_is_kept_for_a_minute() -> None:
    clock = FakeClock()
    missing = MissingDatabases(clock)
    missing.add(b"shop")
    assert b"shop" in missing
    assert b"other" not in missing
    assert None not in missing
    clock.move(KEPT_SECONDS - 1)
    assert b"shop" in missing
    clock.move(1)
    assert b"shop" not in missing
    missing.add(b"shop")
    assert b"shop" in missing


def test_the_oldest_name_makes_room() -> None:
    missing = MissingDatabases(FakeClock())
    names = [b"%d" % number for number in range(NAMES_MAX)]
    for name in (*names, names[0], b"one more"):
        missing.add(name)
    kept = [name for name in (*names, b"one more") if name in missing]
    assert kept == [names[0], *names[2:], b"one more"]
