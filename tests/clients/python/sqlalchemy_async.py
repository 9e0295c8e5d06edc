"""SQLAlchemy 2 with its pool, asynchronous, on asyncpg."""

import asyncio
import io
import os
import urllib.parse

import asyncpg
import commands
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from values import JSON, VALUES

opened = None


def version():
    return [f"SQLAlchemy {sqlalchemy.__version__}, asyncpg {asyncpg.__version__}"]


def engine(database=os.environ["PGDATABASE"], **more):
    where = "{PGUSER}@{PGHOST}:{PGPORT}".format(**os.environ)
    name = urllib.parse.quote(database)  # an @ in it is %40
    return create_async_engine(f"postgresql+asyncpg://{where}/{name}", **more)


async def once(ask, *where, **more):
    made = engine(*where, **more)
    try:
        async with made.connect() as connection:
            return await ask(connection)
    finally:
        await made.dispose()


async def one(connection, sql, **parameters):
    return (await connection.execute(text(sql), parameters)).one()


async def connect():
    return await once(lambda connection: one(connection, commands.DATABASE))


async def key_in_name(database):
    return await once(lambda connection: one(connection, commands.SHARD), database)


async def key_in_options(option):
    name, _, key = option.partition("=")
    settings = {"server_settings": {name: key}}
    return await once(lambda connection: one(connection, commands.SHARD), connect_args=settings)


async def types():
    lines = []

    async def ask(connection):
        for name, value in {**VALUES, "json": JSON, "jsonb": JSON}.items():
            (read,) = await one(connection, f"select cast(:value as {name})", value=value)
            lines.append(f"{name} {read!r}")

    await once(ask)
    return lines


async def prepared():
    async def ask(connection):
        statements = [sql + "cast(:n as int)" for sql in commands.STATEMENTS]
        return [(await one(connection, sql, n=1))[0] for sql in statements]

    sums = await once(ask)
    return [len(sums), sum(sums)]


async def cursor():
    async def ask(connection):
        rows = await connection.stream_scalars(text(commands.ROWS))
        return [n async for portion in rows.partitions(1000) for n in portion]

    numbers = await once(ask)
    return [len(numbers), sum(numbers)]


async def copy():
    async def ask(connection):
        await connection.execute(text("create temp table copied (n int, s text)"))
        driver = (await connection.get_raw_connection()).driver_connection
        await driver.copy_records_to_table("copied", records=commands.COPIED)
        out = io.BytesIO()
        await driver.copy_from_table("copied", output=out)
        return out.getvalue()

    out = await once(ask)
    return [out.count(b"\n"), commands.checksum([out])]


async def rollback():
    async def ask(connection):
        await connection.execute(text("create temp table kept (n int primary key)"))
        await connection.commit()
        try:
            async with connection.begin():
                await connection.execute(text("insert into kept values (1)"))
                await connection.execute(text("insert into kept values (1)"))
        except sqlalchemy.exc.IntegrityError as error:
            return [error.orig.sqlstate, *await one(connection, "select count(*) from kept")]

    return await once(ask)


async def cancel():
    async def ask(connection):
        try:
            await one(connection, commands.SLEEP)
        except TimeoutError:  # what the driver makes of the server's 57014
            await connection.rollback()
            return ["cancelled", *await one(connection, "select 1")]

    return await once(ask, connect_args={"command_timeout": 1})


async def pool():
    global opened
    opened = engine(pool_size=commands.POOL, max_overflow=0, pool_pre_ping=True)
    return [await commands.at_once_async(hold)]


async def hold(meet):
    async with opened.connect() as connection:
        (pid,) = await one(connection, commands.PID)
        await meet()
    return pid


async def query(n):
    async with opened.connect() as connection:
        return (await one(connection, "select cast(:n as int)", n=n))[0]


async def again():
    return await commands.recovered_async(query, hold)


async def refused(database):
    try:
        await once(lambda connection: one(connection, "select 1"), database)
    except sqlalchemy.exc.DBAPIError as error:
        driver_error = error.orig.__cause__
        return [commands.one_line(error), driver_error.sqlstate, driver_error.hint]


async def close():
    await opened.dispose()
    return ["closed"]


asyncio.run(commands.serve_async(globals()))
