"""psycopg 3 with the pool of psycopg_pool, from threads."""

import datetime
import decimal
import threading
import uuid

import psycopg
import psycopg_pool
from commands import POOL, SLEEPING, again, at_once, checksum, one_line, serve, wait_until
from psycopg.types.json import Jsonb

VALUES = {
    "bool": True,
    "int2": -32768,
    "int4": 2**31 - 1,
    "int8": -(2**63),
    "float4": 1.5,
    "float8": 1e-300,
    "numeric": decimal.Decimal("12345678901234567890.123456789"),
    "text": 'it\'s a "quote"\nanother line, ünïcödé ✓',
    "varchar": "",
    "bytea": bytes(range(256)),
    "date": datetime.date(2024, 2, 29),
    "timestamptz": datetime.datetime(2024, 2, 29, 12, 0, 0, 123456, datetime.UTC),
    "interval": datetime.timedelta(days=3, seconds=5, microseconds=7),
    "uuid": uuid.UUID("5ca1ab1e-0000-4000-8000-00000000c0de"),
    "json": Jsonb({"a": [1, None]}),
    "jsonb": Jsonb({"b": "ü"}),
    "int4[]": [1, 2, 3],
    "text[]": ["a", None, ""],
    "int8 ": None,
}
pool = None


def version():
    return [f"psycopg {psycopg.__version__}, psycopg_pool {psycopg_pool.__version__}"]


def connect():
    with psycopg.connect() as connection:
        return connection.execute("select current_database(), 1").fetchone()


def shard(**where):
    with psycopg.connect(**where) as connection:
        return connection.execute("select name from shard_identity").fetchone()


def types():
    with psycopg.connect() as connection:
        for binary in (False, True):
            for name, value in VALUES.items():
                cursor = connection.cursor(binary=binary)
                placeholder = "%b" if binary else "%t"
                if binary and name in ("json", "jsonb"):
                    placeholder = "%s"
                sql = f"select {placeholder}::{name}"
                (read,) = cursor.execute(sql, [value]).fetchone()
                yield f"{name} {'binary' if binary else 'text'} {read!r}"


def prepared():
    with psycopg.connect() as connection:
        total = 0
        for _ in range(2):
            for n in range(300):
                sql = f"select {n} + %s"
                total += connection.execute(sql, [1], prepare=True).fetchone()[0]
    return [600, total]


def cursor():
    with psycopg.connect() as connection, connection.cursor("portions") as cursor:
        cursor.itersize = 1000
        cursor.execute("select n from generate_series(1, 100000) n")
        numbers = [n for (n,) in cursor]
    return [len(numbers), sum(numbers)]


def copy():
    with psycopg.connect() as connection:
        connection.execute("create temp table copied (n int, s text)")
        with connection.cursor().copy("copy copied from stdin") as rows:
            for n in range(10_000):
                rows.write_row((n, f"row\t{n}"))
        with connection.cursor().copy("copy copied to stdout") as rows:
            out = [bytes(part) for part in rows]
    return [len(out), checksum(out)]


def rollback():
    with psycopg.connect(autocommit=True) as connection:
        connection.execute("create temp table kept (n int primary key)")
        try:
            with connection.transaction():
                connection.execute("insert into kept values (1)")
                connection.execute("insert into kept values (1)")
        except psycopg.Error as error:
            state = error.sqlstate
        return [state, *connection.execute("select count(*) from kept").fetchone()]


def cancel():
    with psycopg.connect(autocommit=True) as connection, psycopg.connect() as other:
        pid = connection.execute("select pg_backend_pid()").fetchone()[0]
        other.autocommit = True

        def cancel_it():
            wait_until(lambda: other.execute(SLEEPING.format(pid)).fetchone()[0])
            connection.cancel_safe()

        cancelling = threading.Thread(target=cancel_it)
        cancelling.start()
        try:
            connection.execute("select pg_sleep(60)")
        except psycopg.Error as error:
            state = error.sqlstate
        cancelling.join()
        return [state, *connection.execute("select 1").fetchone()]


def open_pool():
    global pool
    check = psycopg_pool.ConnectionPool.check_connection
    pool = psycopg_pool.ConnectionPool(min_size=POOL, max_size=POOL, check=check, open=True)
    pool.wait()
    return [at_once(hold)]


def hold(meet):
    with pool.connection() as connection:
        (pid,) = connection.execute("select pg_backend_pid()").fetchone()
        meet()
    return pid


def query(n):
    with pool.connection() as connection:
        return connection.execute("select %s::int", [n]).fetchone()[0]


def refused(database):
    try:
        psycopg.connect(dbname=database).close()
    except psycopg.Error as error:
        return [error.sqlstate, one_line(error)]


def close():
    pool.close()
    return ["closed"]


commands = {
    "version": version,
    "connect": connect,
    "key_in_name": lambda database: shard(dbname=database),
    "key_in_options": lambda option: shard(options=f"-c {option}"),
    "types": types,
    "prepared": prepared,
    "cursor": cursor,
    "copy": copy,
    "rollback": rollback,
    "cancel": cancel,
    "pool": open_pool,
    "again": lambda: again(query, hold),
    "refused": refused,
    "close": close,
}
serve(commands, lambda error: getattr(error, "sqlstate", None))
