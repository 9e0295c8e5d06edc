"""Django with the pool that it has on psycopg 3."""

import os

import commands
import django
import psycopg
from django.conf import settings
from django.db import Error, connections, transaction
from values import JSON, VALUES

DATABASE = {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": os.environ["PGDATABASE"],
    "USER": os.environ["PGUSER"],
    "HOST": os.environ["PGHOST"],
    "PORT": os.environ["PGPORT"],
}
SIZE = {"min_size": commands.POOL, "max_size": commands.POOL}
settings.configure(
    USE_TZ=True,
    DATABASES={
        "default": DATABASE,
        "prepared": {**DATABASE, "OPTIONS": {"server_side_binding": True, "prepare_threshold": 0}},
        "pooled": {**DATABASE, "OPTIONS": {"pool": SIZE}, "CONN_HEALTH_CHECKS": True},
    },
)
django.setup()


def version():
    return [f"Django {django.get_version()}, psycopg {psycopg.__version__}"]


class Connected:
    """Opens a connection for a block and closes it; `more` are keys of DATABASES."""

    def __init__(self, alias="default", **more):
        connections.databases["new"] = {**connections.databases[alias], **more}
        self.connection = connections.create_connection("new")

    def __enter__(self):
        return self.connection

    def __exit__(self, *_):
        self.connection.close()


def one(connection, sql, parameters=None):
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchone()


def connect():
    with Connected() as connection:
        return one(connection, commands.DATABASE)


def key_in_name(database):
    with Connected(NAME=database) as connection:
        return one(connection, commands.SHARD)


def key_in_options(option):
    with Connected(OPTIONS={"options": f"-c {option}"}) as connection:
        return one(connection, commands.SHARD)


def types():
    for alias in ("default", "prepared"):
        with Connected(alias) as connection:
            for name, value in {**VALUES, "json": JSON, "jsonb": JSON}.items():
                (read,) = one(connection, f"select (%s)::{name}", [value])
                yield f"{name} {alias} {read!r}"


def prepared():
    with Connected("prepared") as connection:
        sums = [one(connection, sql + "%s::int", [1])[0] for sql in commands.STATEMENTS]
    return [len(sums), sum(sums)]


def cursor():
    with Connected() as connection, connection.chunked_cursor() as cursor:
        cursor.execute(commands.ROWS)
        numbers = []
        while portion := cursor.fetchmany(1000):
            numbers += [n for (n,) in portion]
    return [len(numbers), sum(numbers)]


def copy():
    with Connected() as connection, connection.cursor() as cursor:
        cursor.execute("create temp table copied (n int, s text)")
        with cursor.copy("copy copied from stdin") as rows:
            for row in commands.COPIED:
                rows.write_row(row)
        with cursor.copy("copy copied to stdout") as rows:
            out = [bytes(part) for part in rows]
    return [len(out), commands.checksum(out)]


def rollback():
    connection = connections["default"]
    try:
        with connection.cursor() as cursor:
            cursor.execute("create temp table kept (n int primary key)")
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("insert into kept values (1)")
                cursor.execute("insert into kept values (1)")
        except Error as error:
            return [error.__cause__.sqlstate, *one(connection, "select count(*) from kept")]
    finally:
        connection.close()


def cancel():
    with Connected() as connection:
        sleeping = commands.SLEEPING.format(*one(connection, commands.PID))

        def begun():
            with Connected() as other:
                return one(other, sleeping)[0]

        driver = connection.connection
        error = commands.cancelled(
            begun, driver.cancel_safe, lambda: one(connection, commands.SLEEP)
        )
        return [error.__cause__.sqlstate, *one(connection, "select 1")]


def pool():
    return [commands.at_once(hold)]


def asked(sql, parameters=None, meet=lambda: None):
    connection = connections["pooled"]  # a thread's own, on a session of the pool
    try:
        (value,) = one(connection, sql, parameters)
        meet()
        return value
    finally:
        connection.close()


def hold(meet):
    return asked(commands.PID, meet=meet)


def query(n):
    return asked("select %s::int", [n])


def again():
    return commands.recovered(query, hold)


def refused(database):
    try:
        with Connected(NAME=database) as connection:
            one(connection, "select 1")
    except Error as error:
        return [error.__cause__.sqlstate, commands.one_line(error)]


def close():
    connections["pooled"].close_pool()
    return ["closed"]


commands.serve(globals())
