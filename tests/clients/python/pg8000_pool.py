"""pg8000, which is all Python, with SQLAlchemy's pool."""

import io
import os

import commands
import pg8000.dbapi
from queue_pool import Pool
from values import JSON, VALUES

WHERE = {
    "user": os.environ["PGUSER"],
    "host": os.environ["PGHOST"],
    "port": int(os.environ["PGPORT"]),
    "database": os.environ["PGDATABASE"],
}
opened = None


def version():
    return [f"pg8000 {pg8000.__version__}"]


def once(ask, **where):
    connection = pg8000.dbapi.connect(**{**WHERE, **where})
    connection.autocommit = True
    try:
        return ask(connection)
    finally:
        connection.close()


def one(connection, sql, parameters=()):
    cursor = connection.cursor()
    cursor.execute(sql, parameters)
    return cursor.fetchone()


def connect():
    return once(lambda connection: one(connection, commands.DATABASE))


def key_in_name(database):
    return once(lambda connection: one(connection, commands.SHARD), database=database)


def key_in_options(option):
    name, _, key = option.partition("=")
    parameters = {"startup_params": {name: key}}
    return once(lambda connection: one(connection, commands.SHARD), **parameters)


def types():
    def ask(connection):  # the driver has the text format alone
        for name, value in {**VALUES, "json": JSON, "jsonb": JSON}.items():
            (read,) = one(connection, f"select cast(%s as {name})", [value])
            yield f"{name} text {read!r}"

    return once(lambda connection: list(ask(connection)))


def prepared():
    def ask(connection):
        statements = [sql + "cast(%s as int)" for sql in commands.STATEMENTS]
        return [one(connection, sql, [1])[0] for sql in statements]

    sums = once(ask)
    return [len(sums), sum(sums)]


def cursor():
    def ask(connection):
        connection.autocommit = False
        cursor = connection.cursor()
        cursor.execute(f"declare portions cursor for {commands.ROWS}")
        while cursor.execute("fetch 1000 from portions") or (portion := cursor.fetchall()):
            yield from (n for (n,) in portion)
        connection.rollback()

    numbers = once(lambda connection: list(ask(connection)))
    return [len(numbers), sum(numbers)]


def copy():
    rows = "".join(f"{n}\t{text}\n".replace("row\t", "row\\t") for n, text in commands.COPIED)
    out = io.BytesIO()

    def ask(connection):
        cursor = connection.cursor()
        cursor.execute("create temp table copied (n int, s text)")
        cursor.execute("copy copied from stdin", stream=io.StringIO(rows))
        cursor.execute("copy copied to stdout", stream=out)

    once(ask)
    return [out.getvalue().count(b"\n"), commands.checksum([out.getvalue()])]


def rollback():
    def ask(connection):
        cursor = connection.cursor()
        cursor.execute("create temp table kept (n int primary key)")
        connection.autocommit = False
        try:
            cursor.execute("insert into kept values (1)")
            cursor.execute("insert into kept values (1)")
        except pg8000.dbapi.DatabaseError as error:
            connection.rollback()
            return [error.args[0]["C"], *one(connection, "select count(*) from kept")]
        finally:
            connection.rollback()

    return once(ask)


def cancel():
    raise commands.Cannot("it has no cancel")


def pool():
    global opened
    opened = Pool(lambda: pg8000.dbapi.connect(**WHERE), one)
    return [commands.at_once(opened.hold)]


def query(n):
    return opened.asked("select cast(%s as int)", [n])


def again():
    return commands.recovered(query, opened.hold)


def refused(database):
    try:
        once(lambda connection: None, database=database)
    except pg8000.dbapi.DatabaseError as error:
        return [commands.one_line(error)]


def close():
    opened.close()
    return ["closed"]


commands.serve(globals())
