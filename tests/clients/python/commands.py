"""Reads commands on standard input and answers them, for all of the Python programs.

A program is a module with a function for each command; it returns the lines of the answer.
"""

import asyncio
import hashlib
import inspect
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

POOL = 20
QUERIES = 40
AGAIN_SECONDS_MAX = 45.0  # on a busy machine; else a second or two
PAUSE_SECONDS = 0.2

DATABASE = "select current_database(), 1"
SHARD = "select name from shard_identity"
PID = "select pg_backend_pid()"
SLEEP = "select pg_sleep(60)"
SLEEPING = "select count(*) from pg_stat_activity where pid = {} and wait_event = 'PgSleep'"
ROWS = "select n from generate_series(1, 100000) n"
STATEMENTS = [f"select {n} + " for n in range(300)] * 2
COPIED = [(n, f"row\t{n}") for n in range(10_000)]


class Cannot(Exception):
    """What a driver cannot do by its nature; the text says why."""


def serve(commands):
    """Answer commands until the input ends: the functions of the module `__main__`."""
    for line in sys.stdin:
        name, *arguments = line.split()
        try:
            answer(commands[name](*arguments))
        except Exception as error:
            answer_error(error)


async def serve_async(commands):
    """Do the same for functions that may be coroutines, on a loop that runs all the time."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, *arguments = line.split()
        try:
            lines = commands[name](*arguments)
            answer(await lines if inspect.isawaitable(lines) else lines)
        except Exception as error:
            answer_error(error)


def answer(lines):
    for one in list(lines):
        print(one)
    print(".", flush=True)


def answer_error(error):
    if isinstance(error, Cannot):
        answer([f"cannot: {error}"])
    else:
        answer([f"error: {sqlstate(error)} {one_line(error)} ({type(error).__name__})"])


def sqlstate(error):
    """Return the SQLSTATE where drivers have it, None without."""
    found = getattr(error, "orig", None) or error.__cause__ or error
    for name in ("sqlstate", "pgcode"):
        if hasattr(found, name):
            return getattr(found, name)
    return None


def one_line(value):
    """Return a text without line breaks."""
    return " ".join(str(value).split())


def checksum(parts):
    """Return a checksum of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def cancelled(begun, cancel, sleep):
    """Run `sleep` and cancel it from another thread as soon as it has begun; return its error."""

    def cancel_it():
        deadline = time.monotonic() + AGAIN_SECONDS_MAX
        while not begun():
            if time.monotonic() > deadline:
                raise TimeoutError("the query has not begun")
            time.sleep(0.01)
        cancel()

    cancelling = threading.Thread(target=cancel_it)
    cancelling.start()
    try:
        sleep()
    except Exception as error:
        return error
    finally:
        cancelling.join()
    raise AssertionError("it was not cancelled")


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


def recovered(query, hold):
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
            time.sleep(PAUSE_SECONDS)


async def at_once_async(hold):
    """Return how many backends twenty tasks have at once: `at_once`, with an awaited meet()."""
    barrier = asyncio.Barrier(POOL)
    async with asyncio.timeout(AGAIN_SECONDS_MAX):
        return len(set(await asyncio.gather(*(hold(barrier.wait) for _ in range(POOL)))))


async def recovered_async(query, hold):
    """Return what `recovered` returns."""
    some = asyncio.Semaphore(POOL)

    async def asked(n):
        async with some:
            return await tried_again_async(lambda: query(n))

    answers = await asyncio.gather(*(asked(n) for n in range(QUERIES)))
    assert answers == list(range(QUERIES)), answers
    opened = await tried_again_async(lambda: at_once_async(hold))
    assert opened == POOL, opened
    return [len(answers)]


async def tried_again_async(do):
    """Return what `tried_again` returns."""
    deadline = time.monotonic() + AGAIN_SECONDS_MAX
    while True:
        try:
            return await do()
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(PAUSE_SECONDS)
