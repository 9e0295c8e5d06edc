"""psycopg 3 with the pool of psycopg_pool, from threads."""

import commands
import psycopg
import psycopg_pool
from values import JSON, VALUES

opened = None


def version():
    return [f"psycopg {psycopg.__version__}, psycopg_pool {psycopg_pool.__version__}"]


def one(connection, sql, parameters=None, **more):
    return connection.execute(sql, parameters, **more).fetchone()


def connect():
    with psycopg.connect() as connection:
        return one(connection, commands.DATABASE)


def key_in_name(database):
    with psycopg.connect(dbname=database) as connection:
        return one(connection, commands.SHARD)


def key_in_options(option):
    with psycopg.connect(options=f"-c {option}") as connection:
        return one(connection, commands.SHARD)


def types():
    with psycopg.connect() as connection:
        for binary, placeholder in ((False, "%t"), (True, "%b")):
            for name, value in VALUES.items():
                cursor = connection.cursor(binary=binary)
                (read,) = cursor.execute(f"select {placeholder}::{name}", [value]).fetchone()
                yield f"{name} {'binary' if binary else 'text'} {read!r}"
            for name in ("json", "jsonb"):
                yield f"{name} {one(connection, f'select %s::{name}', [JSON], binary=binary)!r}"


def prepared():
    with psycopg.connect() as connection:
        sums = [one(connection, sql + "%s", [1], prepare=True)[0] for sql in commands.STATEMENTS]
    return [len(sums), sum(sums)]


def cursor():
    with psycopg.connect() as connection, connection.cursor("portions") as cursor:
        cursor.itersize = 1000
        numbers = [n for (n,) in cursor.execute(commands.ROWS)]
    return [len(numbers), sum(numbers)]


def copy():
    with psycopg.connect() as connection:
        connection.execute("create temp table copied (n int, s text)")
        with connection.cursor().copy("copy copied from stdin") as rows:
            for row in commands.COPIED:
                rows.write_row(row)
        with connection.cursor().copy("copy copied to stdout") as rows:
            out = [bytes(part) for part in rows]
    return [len(out), commands.checksum(out)]


def rollback():
    with psycopg.connect(autocommit=True) as connection:
        connection.execute("create temp table kept (n int primary key)")
        try:
            with connection.transaction():
                connection.execute("insert into kept values (1)")
                connection.execute("insert into kept values (1)")
        except psycopg.Error as error:
            return [error.sqlstate, *one(connection, "select count(*) from kept")]


def cancel():
    with psycopg.connect(autocommit=True) as connection, psycopg.connect() as other:
        other.autocommit = True
        sleeping = commands.SLEEPING.format(*one(connection, commands.PID))
        error = commands.cancelled(
            lambda: one(other, sleeping)[0],
            connection.cancel_safe,
            lambda: connection.execute(commands.SLEEP),
        )
        return [error.sqlstate, *one(connection, "select 1")]


def pool():
    global opened
    check = psycopg_pool.ConnectionPool.check_connection
    size = commands.POOL
    opened = psycopg_pool.ConnectionPool(min_size=size, max_size=size, check=check, open=True)
    opened.wait()
    return [commands.at_once(hold)]


def hold(meet):
    with opened.connection() as connection:
        (pid,) = one(connection, commands.PID)
        meet()
    return pid


def query(n):
    with opened.connection() as connection:
        return one(connection, "select %s::int", [n])[0]


def again():
    return commands.recovered(query, hold)


def refused(database):
    try:
        psycopg.connect(dbname=database).close()
    except psycopg.Error as error:
        return [error.sqlstate, commands.one_line(error)]


def close():
    opened.close()
    return ["closed"]


commands.serve(globals())
