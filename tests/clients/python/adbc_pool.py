"""ADBC's driver for PostgreSQL, which returns Arrow, with SQLAlchemy's pool."""

import urllib.parse

import adbc_driver_manager
import adbc_driver_postgresql.dbapi
import commands
import pyarrow
from adbc_driver_postgresql import StatementOptions
from queue_pool import Pool
from values import JSON, VALUES

opened = None


def version():
    return [f"adbc-driver-postgresql {adbc_driver_postgresql.__version__}"]


def opened_one(where=""):
    return adbc_driver_postgresql.dbapi.connect(f"postgresql:///{where}", autocommit=True)


def once(ask, *where):
    with opened_one(*where) as connection:
        return ask(connection)


def one(connection, sql, parameters=()):
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters or None)
        return cursor.fetchone()


def connect():
    return once(lambda connection: one(connection, commands.DATABASE))


def key_in_name(database):
    where = urllib.parse.quote(database)  # an @ in it is %40
    return once(lambda connection: one(connection, commands.SHARD), where)


def key_in_options(option):
    where = f"?options={urllib.parse.quote(f'-c {option}')}"
    return once(lambda connection: one(connection, commands.SHARD), where)


def types():
    def ask(connection):  # the driver has the binary format alone
        for name, value in {**VALUES, "json": JSON, "jsonb": JSON}.items():
            cast = "$1::text" if name in ("json", "jsonb") else "$1"
            (read,) = one(connection, f"select cast({cast} as {name})", [value])
            yield f"{name} binary {read!r}"

    return once(lambda connection: list(ask(connection)))


def prepared():
    def ask(connection):
        return [one(connection, sql + "$1::int", [1])[0] for sql in commands.STATEMENTS]

    sums = once(ask)
    return [len(sums), sum(sums)]


def cursor():
    def ask(connection):
        with connection.cursor() as cursor:
            cursor.adbc_statement.set_options(
                **{StatementOptions.BATCH_SIZE_HINT_BYTES.value: 65536}
            )
            cursor.execute(commands.ROWS)
            for batch in cursor.fetch_record_batch():
                yield from batch.column(0).to_pylist()

    numbers = once(lambda connection: list(ask(connection)))
    return [len(numbers), sum(numbers)]


def copy():
    numbers, texts = zip(*commands.COPIED, strict=True)
    rows = pyarrow.table({"n": pyarrow.array(numbers, pyarrow.int32()), "s": list(texts)})

    def ask(connection):
        with connection.cursor() as cursor:  # both are COPY on the wire
            cursor.adbc_ingest("copied", rows, mode="create", temporary=True)
            cursor.execute("select n, s from copied")
            return cursor.fetch_arrow_table().to_pylist()

    out = once(ask)
    return [len(out), commands.checksum([repr(out).encode()])]


def rollback():
    def ask(connection):
        with connection.cursor() as cursor:
            cursor.execute("create temp table kept (n int primary key)")
            cursor.execute("begin")
            cursor.execute("insert into kept values (1)")
            try:
                cursor.execute("insert into kept values (1)")
            except adbc_driver_manager.Error as error:
                cursor.execute("rollback")
                return [error.sqlstate, *one(connection, "select count(*) from kept")]

    return once(ask)


def cancel():
    def ask(connection):
        sleeping = commands.SLEEPING.format(*one(connection, commands.PID))
        with connection.cursor() as cursor:
            error = commands.cancelled(
                lambda: once(lambda other: one(other, sleeping))[0],
                cursor.adbc_cancel,
                lambda: cursor.execute(commands.SLEEP).fetchall(),
            )
        return [error.sqlstate, *one(connection, "select 1")]

    return once(ask)


def pool():
    global opened
    opened = Pool(opened_one, one)
    return [commands.at_once(opened.hold)]


def query(n):
    return opened.asked("select $1::int", [n])


def again():
    return commands.recovered(query, opened.hold)


def refused(database):
    try:
        once(lambda connection: None, urllib.parse.quote(database))
    except adbc_driver_manager.Error as error:
        return [error.sqlstate, commands.one_line(error)]


def close():
    opened.close()
    return ["closed"]


commands.serve(globals())
