"""The decisions of a pool: who gets which session, which one goes, and when (P18, P23, P28, P34 to
P39, P43)."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.pool.policy import (
    JITTER_MAX,
    KEYS_MAX,
    RESET_FAILURES_MAX,
    UNPOOLABLE_SECONDS,
    Bounds,
    IdleSessions,
    SpareBackoff,
    Unpoolable,
)
from proxy.pool.pool_counts import RetireReason

BOUNDS = Bounds(
    idle_max=3,
    size_max=0,
    spare_min=1,
    lifetime_seconds=1000,
    idle_seconds=100,
    check_seconds=30,
)


@dataclass(eq=False, slots=True)
class Kept:
    """A session, as much of it as the policy knows."""

    born_at: float = 0.0
    idle_since: float = 0.0
    ends_at: float = math.inf
    used: bool = True


def idle_sessions(bounds: Bounds = BOUNDS, jitter: float = 0.0) -> IdleSessions[str, Kept]:
    return IdleSessions(bounds, lambda: jitter)


def filled(idle: IdleSessions[str, Kept], *keys: str) -> list[Kept]:
    """Add a session of each of these keys, a second after the one before."""
    sessions = [Kept(at, at) for at in range(len(keys))]
    for session, key in zip(sessions, keys, strict=True):
        assert idle.add(session, key) == []
    return sessions


# Who gets which


def test_p28_the_session_that_became_idle_last_is_taken_first() -> None:
    idle = idle_sessions()
    first, second, third = filled(idle, "a", "a", "a")
    assert [idle.take("a", 5), idle.take("a", 5)] == [third, second]
    third.idle_since = 6
    idle.add(third, "a")
    assert [idle.take("a", 7) for _ in range(3)] == [third, first, None]
    assert len(idle) == 0


def test_p28_a_spare_is_taken_when_no_session_that_was_used_is_left() -> None:
    # Two psql, one right after the other, had two backends: the spare that was dialled for the
    # first was ready after its end, and so had become idle last.
    idle = idle_sessions()
    first, second = filled(idle, "a", "a")
    spare = Kept(2, 2, used=False)
    idle.add(spare, "a")
    assert [idle.take("a", 5) for _ in range(4)] == [second, first, spare, None]


def test_p6_no_session_is_taken_for_another_key() -> None:
    idle = idle_sessions()
    (session,) = filled(idle, "a")
    assert idle.take("b", 1) is None
    assert (idle.count("a"), idle.count("b"), list(idle)) == (1, 0, [session])


def test_p18_without_room_the_least_recently_used_of_the_target_goes_and_not_this_one() -> None:
    idle = idle_sessions()
    one, two, three = filled(idle, "a", "b", "b")
    newest = Kept(3, 3)
    assert idle.add(newest, "c") == [one]
    assert idle.count("a") == 0
    again = idle.take("b", 4)
    assert again is three
    again.idle_since = 4
    assert idle.add(again, "b") == []
    assert idle.add(Kept(5, 5), "b") == [two]
    assert next(iter(idle)) is newest


def test_p18_without_any_room_nothing_is_kept() -> None:
    idle = idle_sessions(Bounds(0, 0, 0, 1000, 100, 30))
    session = Kept()
    assert idle.add(session, "a") == [session]
    assert (len(idle), idle.next_expiry(), idle.expires_at(session)) == (0, None, math.inf)


def test_p38_the_least_recently_used_makes_room_for_a_dial() -> None:
    idle = idle_sessions()
    assert idle.least_recent() is None
    one, two = filled(idle, "a", "b")
    assert idle.least_recent() is one
    assert (idle.remove(one), idle.remove(one)) == (True, False)
    assert idle.least_recent() is two


# Lifetimes


@pytest.mark.parametrize(
    ("born_at", "idle_since", "jitter", "ends_at", "reason"),
    [
        (0, 0, 0.0, 100, RetireReason.IDLE),
        (0, 0, 1.0, 90, RetireReason.IDLE),
        (0, 950, 0.0, 1000, RetireReason.LIFETIME),
        (0, 895, 1.0, 900, RetireReason.LIFETIME),
        (0, 900, 0.0, 1000, RetireReason.LIFETIME),
    ],
)
def test_p43_jitter_only_shortens_and_the_earlier_end_is_the_reason(
    born_at: float, idle_since: float, jitter: float, ends_at: float, reason: RetireReason
) -> None:
    idle = idle_sessions(jitter=jitter)
    session = Kept(born_at, idle_since, idle.lifetime_ends_at(born_at))
    idle.add(session, "a")
    assert idle.expires_at(session) == idle.next_expiry()
    assert idle.next_expiry() == pytest.approx(ends_at)
    assert idle.expire(ends_at - 0.001) == []
    assert idle.take("a", ends_at + 0.001) is None
    assert idle.expire(ends_at + 0.001) == [(session, reason)]
    assert len(idle) == idle.count("a") == 0


def test_p43_an_older_session_is_not_hidden_by_one_that_expires_earlier() -> None:
    idle = idle_sessions()
    young = Kept(born_at=0, idle_since=0)
    old = Kept(born_at=-990, idle_since=1, ends_at=10)
    idle.add(young, "a")
    idle.add(old, "a")
    assert idle.take("a", 20) is young
    assert idle.take("a", 20) is None
    assert idle.next_expiry() == 10


def test_p43_sessions_that_are_made_together_do_not_end_together() -> None:
    idle = IdleSessions[str, Kept](BOUNDS, iter([0.0, 0.5, 1.0]).__next__)
    assert [idle.lifetime_ends_at(7) for _ in range(3)] == [1007, 957, 907]


# Signs of life


@pytest.mark.parametrize(
    ("check_seconds", "seconds", "checked"),
    [(30, 29, False), (30, 31, True), (0, 0, True), (3600, 99, False)],
)
def test_p23_a_session_that_was_idle_for_longer_is_checked(
    check_seconds: float, seconds: float, checked: bool
) -> None:
    idle = idle_sessions(Bounds(3, 0, 1, 1000, 100, check_seconds))
    assert idle.needs_check(Kept(0, 5), 5 + seconds) is checked


def test_p23_one_that_gives_no_sign_takes_those_with_it_that_are_not_younger() -> None:
    idle = idle_sessions()
    older, silent, younger = Kept(born_at=1), Kept(born_at=2), Kept(born_at=3)
    twin = Kept(born_at=2)
    for session, key in ((older, "a"), (younger, "a"), (twin, "b")):
        idle.add(session, key)
    assert idle.remove_not_younger(silent) == [older, twin]
    assert list(idle) == [younger]


def test_p34_every_session_that_is_idle_then_is_suspect_and_none_after_its_next_client() -> None:
    idle = idle_sessions()
    before, then, after = (Kept(idle_since=at) for at in (9, 10, 11))
    idle.suspect_all(10)
    assert [idle.needs_check(one, 12) for one in (before, then, after)] == [True, True, False]
    before.idle_since = 12
    assert not idle.needs_check(before, 13)
    idle.suspect_all(12)
    assert idle.needs_check(before, 13)


# Keys that cannot be pooled


DATABASE = b"app"


def unpoolable(*failed: str, since: float = 0) -> Unpoolable[str]:
    """Return what is known after failed resets of these keys, in new sessions, one a second."""
    keys = Unpoolable[str]()
    for at, key in enumerate(failed):
        keys.reset_failed(key, since + at, since + at + 0.5)
    return keys


def test_p24_three_resets_that_fail_in_a_row_make_a_key_unpoolable_for_a_minute() -> None:
    keys = unpoolable(*"a" * (RESET_FAILURES_MAX - 1), since=-10)
    keys.reset_succeeded("a")
    for at in range(RESET_FAILURES_MAX):
        assert keys.reason("a", DATABASE, at) is None
        assert keys.reset_failed("a", at, at + 0.5) is (at == RESET_FAILURES_MAX - 1)
    ends = RESET_FAILURES_MAX - 0.5 + UNPOOLABLE_SECONDS
    assert keys.reason("a", DATABASE, ends - 0.1) is RetireReason.RESET_FAILED
    assert keys.reason("b", DATABASE, ends - 0.1) is None
    assert keys.reason("a", DATABASE, ends) is None
    keys.reset_failed("a", 100, 101)
    assert keys.reason("a", DATABASE, 101) is None, "it begins anew"


def test_p24_sessions_that_a_failover_or_a_changed_default_has_failed_count_once() -> None:
    # Each of those that were there fails its reset, at any time after it.
    keys = Unpoolable[str]()
    for born_at, now in ((0, 10), (1, 11), (9, 20), (10, 30), (5, 40)):
        assert not keys.reset_failed("a", born_at, now)
    assert not keys.reset_failed("a", 11, 41), "one that was dialled after it"
    assert not keys.reset_failed("a", 12, 42), "it was there when that one failed"
    assert keys.reset_failed("a", 42.5, 43)


def test_p21_a_database_with_login_triggers_is_unpoolable_until_a_reconnect() -> None:
    keys = Unpoolable[str]()
    keys.databases.add(DATABASE)
    for key in ("a", "b"):
        assert keys.reason(key, DATABASE, 1e6) is RetireReason.LOGIN_TRIGGER
        assert keys.reason(key, b"other", 0) is None
    keys.clear()
    assert keys.reason("a", DATABASE, 0) is None


def test_p46_a_reconnect_forgets_failed_resets() -> None:
    keys = unpoolable(*"a" * RESET_FAILURES_MAX, "b")
    assert keys.reason("a", DATABASE, 10) is not None
    keys.clear()
    assert keys.reason("a", DATABASE, 10) is None
    for at in range(RESET_FAILURES_MAX - 1):
        assert not keys.reset_failed("b", 10 + at, 10.5 + at)


def test_p24_what_is_known_of_keys_is_bounded_and_the_oldest_makes_room() -> None:
    keys, backoff = Unpoolable[int](), SpareBackoff[int]()
    for key in range(KEYS_MAX + 1):
        for at in range(RESET_FAILURES_MAX):
            keys.reset_failed(key, at, at + 0.5)
        backoff.failed(key, 0)
    known = [keys.reason(key, DATABASE, 0) is not None for key in (0, 1, KEYS_MAX)]
    assert known == [False, True, True]
    assert [backoff.allows(key, 0) for key in (0, 1, KEYS_MAX)] == [True, False, False]


# Spares


def test_p37_a_failed_spare_is_tried_again_after_10_seconds_that_double_to_5_minutes() -> None:
    backoff, now = SpareBackoff[str](), 0.0
    waits = []
    for _ in range(20):
        assert backoff.allows("a", now)
        backoff.failed("a", now)
        wait = next(one for one in range(1, 1000) if backoff.allows("a", now + one))
        assert not backoff.allows("a", now + wait - 0.001)
        now += wait
        waits.append(wait)
    assert waits == [10, 20, 40, 80, 160, *[300] * 15]
    assert backoff.allows("b", 0)
    backoff.succeeded("a")
    backoff.failed("a", now)
    assert backoff.allows("a", now + 10)


# Against a model


@dataclass(slots=True)
class Model:
    """The same as a list, the least recently used first."""

    bounds: Bounds
    jitter: float
    held: list[tuple[Kept, str]] = field(default_factory=list)

    def ends_at(self, session: Kept) -> float:
        shorter = 1.0 - JITTER_MAX * self.jitter
        return min(session.ends_at, session.idle_since + self.bounds.idle_seconds * shorter)

    def add(self, session: Kept, key: str) -> list[Kept]:
        self.held.append((session, key))
        over = max(len(self.held) - self.bounds.idle_max, 0)
        surplus, self.held = self.held[:over], self.held[over:]
        return [one for one, _ in surplus]

    def take(self, key: str, now: float) -> Kept | None:
        fitting = [one for one in self.held if one[1] == key and self.ends_at(one[0]) > now]
        if not fitting:
            return None
        self.held.remove(fitting[-1])
        return fitting[-1][0]

    def remove_where(self, picked: list[Kept]) -> list[Kept]:
        self.held = [one for one in self.held if one[0] not in picked]
        return picked

    def expire(self, now: float) -> list[Kept]:
        return self.remove_where([one for one, _ in self.held if self.ends_at(one) <= now])

    def not_younger(self, than: Kept) -> list[Kept]:
        return self.remove_where([one for one, _ in self.held if one.born_at <= than.born_at])


_KEY = st.sampled_from("abc")
_STEP = st.one_of(
    st.tuples(st.just("add"), _KEY),
    st.tuples(st.just("take"), _KEY),
    st.tuples(st.just("return"), _KEY),
    st.tuples(st.sampled_from(["expire", "evict", "silent"]), _KEY),
)


@given(
    st.integers(0, 4),
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(0, 60), _STEP), max_size=40),
)
def test_p18_p28_p38_p43_any_sequence_of_events_has_the_result_of_a_simple_model(
    idle_max: int, jitter: float, steps: list[tuple[int, tuple[str, str]]]
) -> None:
    bounds = Bounds(idle_max, 0, 0, lifetime_seconds=200, idle_seconds=100, check_seconds=30)
    idle, model = idle_sessions(bounds, jitter), Model(bounds, jitter)
    now, in_use = 0.0, list[tuple[Kept, str]]()
    for seconds, (verb, key) in steps:
        now += seconds
        match verb:
            case "add":
                session = Kept(now, now, idle.lifetime_ends_at(now))
                assert idle.add(session, key) == model.add(session, key)
            case "take":
                taken = idle.take(key, now)
                assert taken is model.take(key, now)
                if taken is not None:
                    in_use.append((taken, key))
            case "return" if in_use:
                session, of_key = in_use.pop()
                session.idle_since = now
                assert idle.add(session, of_key) == model.add(session, of_key)
            case "expire":
                assert [one for one, _ in idle.expire(now)] == model.expire(now)
            case "evict":
                oldest = idle.least_recent()
                assert oldest is (model.held[0][0] if model.held else None)
                if oldest is not None:
                    assert idle.remove(oldest)
                    model.remove_where([oldest])
            case "silent" if in_use:
                session, _ = in_use.pop()
                assert idle.remove_not_younger(session) == model.not_younger(session)
        assert list(idle) == [one for one, _ in model.held]
        assert len(idle) <= idle_max
        for one in "abc":
            assert idle.count(one) == sum(of_key == one for _, of_key in model.held)
        ends = min((model.ends_at(one) for one, _ in model.held), default=math.inf)
        assert (idle.next_expiry() or math.inf) == ends
