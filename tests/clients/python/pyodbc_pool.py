"""pyodbc on psqlODBC, with SQLAlchemy's pool."""

import os

import commands
import pyodbc
from queue_pool import Pool
from values import JSON, VALUES

WHERE = {
    "DRIVER": "PostgreSQL Unicode",
    "SERVER": os.environ["PGHOST"],
    "PORT": os.environ["PGPORT"],
    "UID": os.environ["PGUSER"],
    "DATABASE": os.environ["PGDATABASE"],
    "SSLmode": "disable",
}
# Read as it is sent: the driver's cursors, not the whole result in its memory.
CURSORS = {"UseDeclareFetch": "1", "Fetch": "1000"}
ARRAYS = {"int4[]": "{1,2,3}", "text[]": '{a,NULL,""}'}
pyodbc.pooling = False  # the driver manager's, which is off in Debian's configuration as well
opened = None


def version():
    (driver,) = once(lambda connection: [connection.getinfo(pyodbc.SQL_DRIVER_VER)])
    return [f"pyodbc {pyodbc.version}, psqlODBC {driver}"]


def opened_one(**more):
    return pyodbc.connect(**{**WHERE, **more}, autocommit=True)


def once(ask, **more):
    connection = opened_one(**more)
    try:
        return ask(connection)
    finally:
        connection.close()


def one(connection, sql, parameters=()):
    return connection.cursor().execute(sql, *parameters).fetchone()


def connect():
    return once(lambda connection: one(connection, commands.DATABASE))


def key_in_name(database):
    return once(lambda connection: one(connection, commands.SHARD), DATABASE=database)


def key_in_options(option):
    options = {"pqopt": f"{{options='-c {option}'}}"}
    return once(lambda connection: one(connection, commands.SHARD), **options)


def types():
    def ask(connection):  # the driver has the text format alone, and no arrays and intervals
        values = {**VALUES, **ARRAYS, "json": JSON, "jsonb": JSON, "interval": "3 days 00:00:05"}
        for name, value in values.items():
            (read,) = one(connection, f"select cast(? as {name})", [value])
            yield f"{name} text {read!r}"

    return once(lambda connection: list(ask(connection)))


def prepared():
    def ask(connection):
        statements = [sql + "cast(? as int)" for sql in commands.STATEMENTS]
        return [one(connection, sql, [1])[0] for sql in statements]

    sums = once(ask)
    return [len(sums), sum(sums)]


def cursor():
    def ask(connection):
        cursor = connection.cursor().execute(commands.ROWS)
        while portion := cursor.fetchmany(1000):
            yield from (n for (n,) in portion)
        cursor.close()

    numbers = once(lambda connection: list(ask(connection)), **CURSORS)
    return [len(numbers), sum(numbers)]


def copy():
    raise commands.Cannot("ODBC has no COPY of the client's own data")


def rollback():
    def ask(connection):
        cursor = connection.cursor()
        cursor.execute("create temp table kept (n int primary key)")
        connection.autocommit = False
        try:
            cursor.execute("insert into kept values (1)")
            cursor.execute("insert into kept values (1)")
        except pyodbc.Error as error:
            connection.rollback()
            return [error.args[0], *one(connection, "select count(*) from kept")]

    return once(ask)


def cancel():
    def ask(connection):
        sleeping = commands.SLEEPING.format(*one(connection, commands.PID))
        cursor = connection.cursor()
        error = commands.cancelled(
            lambda: once(lambda other: one(other, sleeping))[0],
            cursor.cancel,
            lambda: cursor.execute(commands.SLEEP).fetchone(),
        )
        return [error.args[0], *one(connection, "select 1")]

    return once(ask)


def pool():
    global opened
    opened = Pool(opened_one, one)
    return [commands.at_once(opened.hold)]


def query(n):
    return opened.asked("select cast(? as int)", [n])


def again():
    return commands.recovered(query, opened.hold)


def refused(database):
    try:
        once(lambda connection: None, DATABASE=database)
    except pyodbc.Error as error:
        return [commands.one_line(error.args)]


def close():
    opened.close()
    return ["closed"]


commands.serve(globals())
