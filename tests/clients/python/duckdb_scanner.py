"""DuckDB's scanner of PostgreSQL, with the pool that it has."""

import contextlib
import pathlib

import commands
import duckdb
import duckdb_extension_postgres_scanner as extension
from values import JSON, VALUES

# DuckDB downloads the extension as a rule; here it comes in a package.
FILE = next(pathlib.Path(extension.__file__).parent.rglob("*.duckdb_extension"))
# With more threads they spin while PostgreSQL sends.
database = duckdb.connect(config={"allow_unsigned_extensions": "true", "threads": 1})
database.execute(f"load '{FILE}'")
opened = None


def version():
    return [f"DuckDB {duckdb.__version__}"]


class Attached:
    """Attaches a PostgreSQL database as `pg` for a block, without a pool."""

    def __init__(self, where=""):
        self.where = where.replace("'", "''")

    def __enter__(self):
        self.connection = database.cursor()
        self.connection.execute("set pg_pool_max_connections = 0")
        self.connection.execute(f"attach '{self.where}' as pg (type postgres)")
        return self.connection

    def __exit__(self, *_):
        with contextlib.suppress(duckdb.TransactionException):  # where none is open
            self.connection.execute("rollback")
        self.connection.execute("detach pg")
        self.connection.close()


def asked(connection, sql, name="pg"):
    sql = sql.replace("'", "''")
    return connection.execute(f"from postgres_query('{name}', '{sql}')").fetchone()


def connect():
    with Attached() as connection:
        return asked(connection, commands.DATABASE)


def key_in_name(name):
    with Attached(f"dbname={name}") as connection:
        return connection.execute("select name from pg.shard_identity").fetchone()


def key_in_options(option):
    with Attached(f"options='-c {option}'") as connection:
        return connection.execute("select name from pg.shard_identity").fetchone()


def executed(connection, sql):
    connection.execute(f"call postgres_execute('pg', '{sql}')")


def types():
    values = {**VALUES, "json": JSON, "jsonb": JSON}
    columns = ", ".join(f'"{name}" {name}' for name in values)
    places = ", ".join("?" for _ in values)
    for text in (False, True):
        with Attached() as connection:
            connection.execute(f"set pg_use_text_protocol = {text}")
            connection.execute("begin")  # a transaction has one connection, and so the table
            executed(connection, f"create temp table sent ({columns})")
            sent = list(values.values())
            connection.execute(f"insert into pg.pg_temp.sent values ({places})", sent)
            read = connection.execute("from pg.pg_temp.sent").fetchone()
            connection.execute("rollback")
        for name, value in zip(values, read, strict=True):
            yield f"{name} {'text' if text else 'binary'} {value!r}"


def prepared():
    raise commands.Cannot("it prepares no statements that its user gives")


def cursor():
    with Attached() as connection:
        connection.execute("begin")
        executed(connection, f"create temp table numbers as {commands.ROWS}")
        batches = connection.execute("from pg.pg_temp.numbers").to_arrow_reader(1000)
        numbers = [n for batch in batches for n in batch.column(0).to_pylist()]
        connection.execute("rollback")
    return [len(numbers), sum(numbers)]


def copy():
    with Attached() as connection:  # an insert is COPY on the wire, and so is a scan
        connection.execute("begin")
        executed(connection, "create temp table copied (n int, s text)")
        rows = "select i::int, 'row' || chr(9) || i from range(10000) r(i)"
        connection.execute(f"insert into pg.pg_temp.copied {rows}")
        out = connection.execute("from pg.pg_temp.copied").fetchall()
        connection.execute("rollback")
    return [len(out), commands.checksum([repr(out).encode()])]


def rollback():
    with Attached() as connection:
        connection.execute("begin")
        executed(connection, "create table kept (n int primary key)")
        try:
            executed(connection, "insert into kept values (1), (1)")
        except duckdb.Error as error:
            connection.execute("rollback")
            exists = "select count(*) from pg_class where relname = 'kept'"
            return [commands.one_line(error), *asked(connection, exists)]


def cancel():
    raise commands.Cannot("its interrupt does not reach PostgreSQL before the query has ended")


def pool():
    global opened
    opened = database.cursor()
    opened.execute(f"set pg_pool_max_connections = {commands.POOL}")
    opened.execute("attach '' as pooled (type postgres)")
    return [commands.at_once(hold)]


def hold(meet):
    with opened.cursor() as connection:
        connection.execute("begin")  # a transaction has a connection of its own
        (pid,) = asked(connection, commands.PID, "pooled")
        meet()
        connection.execute("commit")
    return pid


def query(n):
    with opened.cursor() as connection:
        return asked(connection, f"select {n}", "pooled")[0]


def again():
    return commands.recovered(query, hold)


def refused(name):
    try:
        with Attached(f"dbname={name}"):
            pass
    except duckdb.Error as error:
        return [commands.one_line(error)]


def close():
    opened.execute("detach pooled")
    opened.close()
    return ["closed"]


commands.serve(globals())
