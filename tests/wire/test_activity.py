"""Idleness, as W47 defines it: by counted sync points, not by what was said last."""

import pytest

from proxy.wire.activity import Activity
from proxy.wire.messages import Frame


def message(kind: str, payload: bytes = b"") -> bytes:
    return Frame(kind.encode(), payload).encode()


QUERY = message("Q", b"select 1\0")
SYNC = message("S")
FUNCTION_CALL = message("F", b"\0" * 10)
PARSE, BIND, EXECUTE = message("P", b"\0\0\0\0"), message("B", b"\0" * 8), message("E", b"\0" * 5)
FLUSH = message("H")
COPY_DATA, COPY_DONE, COPY_FAIL = message("d", b"1\t2\n"), message("c"), message("f", b"no\0")
TERMINATE = message("X")
ROW, COMPLETE = message("D", b"\0\1\0\0\0\1Z"), message("C", b"SELECT 1\0")
READY, IN_TRANSACTION, FAILED = (message("Z", status) for status in (b"I", b"T", b"E"))
COPY_IN, COPY_BOTH, COPY_OUT = (message(kind, b"\0\0\0") for kind in "GWH")
NOTIFICATION = message("A", b"\0\0\0\1channel\0\0")
ERROR = message("E", b"SERROR\0C42601\0Mno\0\0")

IDLE, BUSY, OPEN = "idle", "busy", "in a transaction, not busy"


def state(activity: Activity) -> str:
    assert not (activity.idle and activity.busy)
    return IDLE if activity.idle else BUSY if activity.busy else OPEN


# (what happens, the state afterwards); "c" is the client, "u" the upstream.
Story = list[tuple[str, bytes, str]]

STORIES: dict[str, Story] = {
    "a simple query": [("c", QUERY, BUSY), ("u", ROW, BUSY), ("u", COMPLETE + READY, IDLE)],
    "a transaction": [
        ("c", QUERY, BUSY),
        ("u", COMPLETE + IN_TRANSACTION, OPEN),
        ("c", QUERY, BUSY),
        ("u", ERROR + FAILED, OPEN),
        ("c", QUERY, BUSY),
        ("u", COMPLETE + READY, IDLE),
    ],
    "pipelined queries: the first answer is not the last": [
        ("c", QUERY + QUERY, BUSY),
        ("u", COMPLETE + READY, BUSY),
        ("u", COMPLETE + READY, IDLE),
    ],
    "pipelined Syncs in several reads": [
        ("c", PARSE + BIND + EXECUTE + SYNC, BUSY),
        ("c", BIND + EXECUTE + SYNC, BUSY),
        ("u", COMPLETE + READY, BUSY),
        ("c", SYNC, BUSY),
        ("u", COMPLETE + READY + READY, IDLE),
    ],
    "work that no Sync has closed yet": [
        ("c", PARSE + FLUSH, BUSY),
        ("u", message("1"), BUSY),
        ("c", SYNC, BUSY),
        ("u", READY, IDLE),
    ],
    "a function call": [("c", FUNCTION_CALL, BUSY), ("u", message("V") + READY, IDLE)],
    "COPY in by a simple query": [
        ("c", QUERY, BUSY),
        ("u", COPY_IN, BUSY),
        ("c", COPY_DATA * 3, BUSY),
        ("c", COPY_DONE, BUSY),
        ("u", COMPLETE + READY, IDLE),
        ("c", QUERY, BUSY),
        ("u", COPY_IN, BUSY),
        ("c", COPY_FAIL, BUSY),
        ("u", ERROR + READY, IDLE),
    ],
    "COPY in by the extended protocol: the Sync before the data is never answered": [
        ("c", PARSE + BIND + EXECUTE + SYNC, BUSY),
        ("u", COPY_IN, BUSY),
        ("c", COPY_DATA, BUSY),
        ("c", COPY_DONE + SYNC, BUSY),
        ("u", COMPLETE + READY, IDLE),
    ],
    "COPY in, sent without waiting for CopyInResponse": [
        ("c", PARSE + BIND + EXECUTE + SYNC + COPY_DATA + COPY_DONE + SYNC, BUSY),
        ("c", QUERY, BUSY),
        ("u", COPY_IN, BUSY),
        ("u", COMPLETE + READY, BUSY),
        ("u", COMPLETE + READY, IDLE),
    ],
    "COPY in that the upstream refuses while data comes": [
        ("c", PARSE + BIND + EXECUTE + SYNC, BUSY),
        ("u", COPY_IN, BUSY),
        ("c", COPY_DATA, BUSY),
        ("u", ERROR, BUSY),
        ("c", COPY_FAIL + SYNC, BUSY),
        ("u", READY, IDLE),
    ],
    "COPY out and replication": [
        ("c", QUERY, BUSY),
        ("u", COPY_OUT + message("d", b"x") + message("c") + COMPLETE + READY, IDLE),
        ("c", QUERY, BUSY),
        ("u", COPY_BOTH, BUSY),
        ("c", COPY_DATA, BUSY),
        ("u", message("d", b"w"), BUSY),
        ("c", COPY_DONE, BUSY),
        ("u", message("c") + COMPLETE + READY, IDLE),
    ],
    "stray ends of COPY, which PostgreSQL ignores": [
        ("c", COPY_DONE + COPY_FAIL, IDLE),
        ("c", QUERY, BUSY),
        ("u", COMPLETE + READY, IDLE),
    ],
    "what comes without being asked for": [
        ("u", NOTIFICATION, IDLE),
        ("u", message("N", b"SNOTICE\0\0") + message("S", b"TimeZone\0UTC\0"), IDLE),
    ],
    "a row that looks like a ReadyForQuery": [
        ("c", QUERY, BUSY),
        ("u", message("D", b"\0\1\0\0\0\6" + READY), BUSY),
        ("u", COMPLETE + READY, IDLE),
    ],
    "a message cut short": [("c", QUERY[:-2], BUSY)],
    "a header cut short": [("c", QUERY[:3], BUSY)],
    "Terminate": [("c", TERMINATE, IDLE)],
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_w47_a_session_is_idle_only_when_every_sync_point_is_answered(story: Story) -> None:
    activity = Activity()
    for number, (who, data, expected) in enumerate(story):
        (activity.client_sent if who == "c" else activity.upstream_sent)(data)
        assert state(activity) == expected, f"step {number}"


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 11])
def test_w47_how_the_bytes_are_cut_makes_no_difference(story: Story, size: int) -> None:
    activity = Activity()
    for who, data, expected in story:
        feed = activity.client_sent if who == "c" else activity.upstream_sent
        for start in range(0, len(data), size):
            feed(data[start : start + size])
        assert state(activity) == expected


def test_terminate_is_noticed_behind_a_query() -> None:
    activity = Activity()
    noticed = [activity.terminated]
    for data in (QUERY, TERMINATE):
        activity.client_sent(data)
        noticed.append(activity.terminated)
    assert noticed == [False, False, True]
    assert activity.busy


def test_nothing_read_changes_nothing() -> None:
    activity = Activity()
    activity.client_sent(b"")
    activity.upstream_sent(b"")
    assert activity.idle


def test_a_payload_of_many_reads_is_skipped_to_its_end() -> None:
    activity = Activity()
    activity.client_sent(QUERY)
    big = message("D", b"Z\0\0\0\5I" * 100_000)
    for start in range(0, len(big), 65_536):
        activity.upstream_sent(big[start : start + 65_536])
    assert activity.busy
    activity.upstream_sent(READY)
    assert activity.idle


def test_a_hostile_length_neither_raises_nor_loops() -> None:
    activity = Activity()
    activity.upstream_sent(b"Z\xff\xff\xff\xff" + b"x" * 100)
    activity.client_sent(b"Q\0\0\0\0" + b"Q\0\0\0\0")
    assert activity.busy
