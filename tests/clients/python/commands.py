"""Reads commands on standard input and answers them, for all of the Python programs.

A program has a function for each command; it returns the lines of the answer.
"""

import hashlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

POOL = 20
QUERIES = 40
AGAIN_SECONDS_MAX = 20.0

SLEEPING = "select count(*) from pg_stat_activity where pid = {} and wait_event = 'PgSleep'"


class Cannot(Exception):
    """What a driver cannot do by its nature; the text says why."""


def serve(commands, sqlstate):
    """Answer commands until the input ends; `sqlstate` finds it in an error."""
    for line in sys.stdin:
        name, *arguments = line.split()
        try:
            lines = list(commands[name](*arguments))
        except Cannot as reason:
            lines = [f"cannot: {reason}"]
        except Exception as error:
            lines = [f"error: {sqlstate(error)} {one_line(error)} ({type(error).__name__})"]
        for one in lines:
            print(one)
        print(".", flush=True)


def one_line(value):
    """Return a text without line breaks."""
    return " ".join(str(value).split())


def checksum(parts):
    """Return a checksum of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def wait_until(true):
    """Wait until something is so: that a query has begun."""
    deadline = time.monotonic() + AGAIN_SECONDS_MAX
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("the query has not begun")
        time.sleep(0.01)


def at_once(hold):
    """Return how many backends twenty threads have at once.

    `hold(meet)` takes a connection, asks its backend's number, calls meet() and gives it back.
    """
    barrier = threading.Barrier(POOL, timeout=AGAIN_SECONDS_MAX)

    def held(_):
        try:
            return hold(barrier.wait)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(POOL) as threads:
        return len(set(threads.map(held, range(POOL))))


def again(query, hold):
    """Return how many of forty queries were answered; then twenty connections are open again."""
    with ThreadPoolExecutor(POOL) as threads:
        answers = list(threads.map(lambda n: tried_again(lambda: query(n)), range(QUERIES)))
    assert answers == list(range(QUERIES)), answers
    opened = tried_again(lambda: at_once(hold))
    assert opened == POOL, opened
    return [len(answers)]


def tried_again(do):
    """Return what something returns, tried for a while: what a pool does not test may fail."""
    deadline = time.monotonic() + AGAIN_SECONDS_MAX
    while True:
        try:
            return do()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
