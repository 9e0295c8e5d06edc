"""psycopg2 with its own pool."""

import io
import os

import commands
import psycopg2
import psycopg2.extras
import psycopg2.pool
from values import JSON, VALUES

WHERE = {"dbname": os.environ["PGDATABASE"]}
psycopg2.extras.register_uuid()
opened = None


def version():
    return [f"psycopg2 {psycopg2.__version__.split()[0]}"]


class Connected:
    """Opens a connection for a block and closes it: psycopg2's own block ends a transaction."""

    def __init__(self, **where):
        self.where = {**WHERE, **where}

    def __enter__(self):
        self.connection = psycopg2.connect(**self.where)
        self.connection.autocommit = True
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
    with Connected(dbname=database) as connection:
        return one(connection, commands.SHARD)


def key_in_options(option):
    with Connected(options=f"-c {option}") as connection:
        return one(connection, commands.SHARD)


def types():
    with Connected() as connection:  # the driver has the text format alone
        for name, value in {**VALUES, "json": JSON, "jsonb": JSON}.items():
            (read,) = one(connection, f"select (%s)::{name}", [value])
            read = bytes(read) if isinstance(read, memoryview) else read
            yield f"{name} text {read!r}"


def prepared():
    raise commands.Cannot("it prepares no statements")


def cursor():
    with Connected() as connection:
        connection.autocommit = False
        with connection.cursor("portions") as cursor:
            cursor.itersize = 1000
            cursor.execute(commands.ROWS)
            numbers = [n for (n,) in cursor]
    return [len(numbers), sum(numbers)]


def copy():
    rows = "".join(f"{n}\t{text}\n".replace("row\t", "row\\t") for n, text in commands.COPIED)
    out = io.StringIO()
    with Connected() as connection, connection.cursor() as cursor:
        cursor.execute("create temp table copied (n int, s text)")
        cursor.copy_expert("copy copied from stdin", io.StringIO(rows))
        cursor.copy_expert("copy copied to stdout", out)
    return [out.getvalue().count("\n"), commands.checksum([out.getvalue().encode()])]


def rollback():
    with Connected() as connection:
        with connection.cursor() as cursor:
            cursor.execute("create temp table kept (n int primary key)")
        connection.autocommit = False
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute("insert into kept values (1)")
                cursor.execute("insert into kept values (1)")
        except psycopg2.Error as error:
            return [error.pgcode, *one(connection, "select count(*) from kept")]


def cancel():
    with Connected() as connection, Connected() as other:
        sleeping = commands.SLEEPING.format(*one(connection, commands.PID))
        error = commands.cancelled(
            lambda: one(other, sleeping)[0],
            connection.cancel,
            lambda: one(connection, commands.SLEEP),
        )
        return [error.pgcode, *one(connection, "select 1")]


def pool():
    global opened
    opened = psycopg2.pool.ThreadedConnectionPool(commands.POOL, commands.POOL, **WHERE)
    return [commands.at_once(hold)]


def asked(sql, parameters=None, meet=lambda: None):
    connection = opened.getconn()
    try:
        connection.autocommit = True
        (value,) = one(connection, sql, parameters)
        meet()
        return value
    finally:
        opened.putconn(connection)  # which closes what is broken


def hold(meet):
    return asked(commands.PID, meet=meet)


def query(n):
    return asked("select %s::int", [n])


def again():
    return commands.recovered(query, hold)


def refused(database):
    try:
        psycopg2.connect(dbname=database).close()
    except psycopg2.Error as error:
        return [error.pgcode, commands.one_line(error)]


def close():
    opened.closeall()
    return ["closed"]


commands.serve(globals())
