"""SQLAlchemy 2 with its pool, on psycopg 3."""

import os
import urllib.parse

import commands
import psycopg
import sqlalchemy
from sqlalchemy import bindparam, text
from values import JSON, VALUES

opened = None


def version():
    return [f"SQLAlchemy {sqlalchemy.__version__}, psycopg {psycopg.__version__}"]


def engine(database=os.environ["PGDATABASE"], **more):
    where = "{PGUSER}@{PGHOST}:{PGPORT}".format(**os.environ)
    name = urllib.parse.quote(database)  # an @ in it is %40
    return sqlalchemy.create_engine(f"postgresql+psycopg://{where}/{name}", **more)


def once(ask, *where, **more):
    made = engine(*where, **more)
    try:
        with made.connect() as connection:
            return ask(connection)
    finally:
        made.dispose()


def one(connection, sql, **parameters):
    return connection.execute(text(sql), parameters).one()


def connect():
    return once(lambda connection: one(connection, commands.DATABASE))


def key_in_name(database):
    return once(lambda connection: one(connection, commands.SHARD), database)


def key_in_options(option):
    options = {"options": f"-c {option}"}
    return once(lambda connection: one(connection, commands.SHARD), connect_args=options)


def types():
    def ask(connection):
        for name, value in {**VALUES, "json": JSON, "jsonb": JSON}.items():
            (read,) = one(connection, f"select cast(:value as {name})", value=value)
            yield f"{name} {read!r}"

    return once(lambda connection: list(ask(connection)))


def prepared():
    def ask(connection):
        statements = [sql + "cast(:n as int)" for sql in commands.STATEMENTS]
        return [one(connection, sql, n=1)[0] for sql in statements]

    sums = once(ask, connect_args={"prepare_threshold": 0})
    return [len(sums), sum(sums)]


def cursor():
    def ask(connection):
        rows = connection.execution_options(yield_per=1000).execute(text(commands.ROWS))
        return [n for portion in rows.scalars().partitions() for n in portion]

    numbers = once(ask)
    return [len(numbers), sum(numbers)]


def copy():
    def ask(connection):
        connection.execute(text("create temp table copied (n int, s text)"))
        cursor = connection.connection.cursor()  # the driver's own
        with cursor.copy("copy copied from stdin") as rows:
            for row in commands.COPIED:
                rows.write_row(row)
        with cursor.copy("copy copied to stdout") as rows:
            return [bytes(part) for part in rows]

    out = once(ask)
    return [len(out), commands.checksum(out)]


def rollback():
    def ask(connection):
        connection.execute(text("create temp table kept (n int primary key)"))
        connection.commit()
        insert = sqlalchemy.insert(sqlalchemy.table("kept", sqlalchemy.column("n")))
        try:
            with connection.begin():
                connection.execute(insert, [{"n": 1}, {"n": 1}])
        except sqlalchemy.exc.IntegrityError as error:
            return [error.orig.sqlstate, *one(connection, "select count(*) from kept")]

    return once(ask)


def cancel():
    def ask(connection):
        sleeping = commands.SLEEPING.format(*one(connection, commands.PID))
        driver = connection.connection.driver_connection
        error = commands.cancelled(
            lambda: once(lambda other: one(other, sleeping)[0]),
            driver.cancel_safe,
            lambda: one(connection, commands.SLEEP),
        )
        connection.rollback()
        return [error.orig.sqlstate, *one(connection, "select 1")]

    return once(ask)


def pool():
    global opened
    opened = engine(pool_size=commands.POOL, max_overflow=0, pool_pre_ping=True)
    return [commands.at_once(hold)]


def hold(meet):
    with opened.connect() as connection:
        (pid,) = one(connection, commands.PID)
        meet()
    return pid


def query(n):
    with opened.connect() as connection:
        statement = text("select cast(:n as int)").bindparams(bindparam("n", n))
        return connection.execute(statement).scalar_one()


def again():
    return commands.recovered(query, hold)


def refused(database):
    try:
        once(lambda connection: None, database)
    except sqlalchemy.exc.OperationalError as error:
        return [error.orig.sqlstate, commands.one_line(error)]


def close():
    opened.dispose()
    return ["closed"]


commands.serve(globals())
