"""asyncpg with its own pool."""

import asyncio
import io

import asyncpg
import commands
from values import JSON, VALUES

opened = None


def version():
    return [f"asyncpg {asyncpg.__version__}"]


async def once(ask, **where):
    connection = await asyncpg.connect(**where)
    try:
        return await ask(connection)
    finally:
        await connection.close()


async def connect():
    return await once(lambda connection: connection.fetchrow(commands.DATABASE))


async def key_in_name(database):
    return await once(lambda connection: connection.fetchrow(commands.SHARD), database=database)


async def key_in_options(option):
    name, _, key = option.partition("=")
    where = {"server_settings": {name: key}}
    return await once(lambda connection: connection.fetchrow(commands.SHARD), **where)


async def types():
    async def ask(connection):  # the driver has the binary format alone
        values = {**VALUES, "json": JSON, "jsonb": JSON}
        for name, value in values.items():
            read = await connection.fetchval(f"select $1::{name}", value)
            lines.append(f"{name} binary {read!r}")

    lines = []
    await once(ask)
    return lines


async def prepared():
    async def ask(connection):
        return [await connection.fetchval(sql + "$1::int", 1) for sql in commands.STATEMENTS]

    sums = await once(ask)
    return [len(sums), sum(sums)]


async def cursor():
    async def ask(connection):
        async with connection.transaction():
            return [row[0] async for row in connection.cursor(commands.ROWS, prefetch=1000)]

    numbers = await once(ask)
    return [len(numbers), sum(numbers)]


async def copy():
    async def ask(connection):
        await connection.execute("create temp table copied (n int, s text)")
        await connection.copy_records_to_table("copied", records=commands.COPIED)
        out = io.BytesIO()
        await connection.copy_from_table("copied", output=out)
        return out.getvalue()

    out = await once(ask)
    return [out.count(b"\n"), commands.checksum([out])]


async def rollback():
    async def ask(connection):
        await connection.execute("create temp table kept (n int primary key)")
        try:
            async with connection.transaction():
                await connection.execute("insert into kept values (1)")
                await connection.execute("insert into kept values (1)")
        except asyncpg.PostgresError as error:
            return [error.sqlstate, await connection.fetchval("select count(*) from kept")]

    return await once(ask)


async def cancel():
    async def ask(connection):
        try:
            await connection.execute(commands.SLEEP, timeout=1)
        except TimeoutError:  # what the driver makes of the server's 57014
            return ["cancelled", await connection.fetchval("select 1")]

    return await once(ask)


async def pool():
    global opened
    opened = await asyncpg.create_pool(min_size=commands.POOL, max_size=commands.POOL)
    return [await commands.at_once_async(hold)]


async def hold(meet):
    async with opened.acquire() as connection:
        pid = await connection.fetchval(commands.PID)
        await meet()
    return pid


async def query(n):
    return await opened.fetchval("select $1::int", n)


async def again():
    return await commands.recovered_async(query, hold)


async def refused(database):
    try:
        await once(lambda connection: connection.fetchval("select 1"), database=database)
    except asyncpg.PostgresError as error:
        return [error.sqlstate, commands.one_line(error), error.detail, error.hint]


async def close():
    await opened.close()
    return ["closed"]


asyncio.run(commands.serve_async(globals()))
