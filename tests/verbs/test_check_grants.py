"""What a role lacks on schema `public`, asked of PostgreSQL as that role."""

from collections.abc import Mapping

import asyncpg

from proxy.emulator.cluster import Cluster, quoted
from proxy.verbs.check_grants import TABLES_SHOWN_MAX, missing_grants

ROLE = 'o\'hara "the" reader'


async def note(cluster: Cluster, database: str) -> str:
    """Return the note for the role."""
    connection = await asyncpg.connect(host=str(cluster.directory), user=ROLE, database=database)
    try:
        return (await missing_grants(connection, ROLE)).note()
    finally:
        await connection.close()


async def test_the_statements_that_it_prints_grant_what_is_missing(
    clusters: Mapping[str, Cluster], scratch_database: str
) -> None:
    cluster = clusters["one"]

    def execute(sql: str) -> None:
        cluster.execute(sql, database=scratch_database)

    execute(f"CREATE ROLE {quoted(ROLE)} LOGIN")
    try:
        execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        found = await note(cluster, scratch_database)
        assert found.startswith("the role lacks USAGE and CREATE on schema public; if it needs to")
        execute(found.split("\n", 1)[1])
        assert await note(cluster, scratch_database) == ""
        # Views, partitions and the tables of others that may be used need no note.
        execute(
            "CREATE TABLE own (n int); GRANT ALL ON own TO PUBLIC; CREATE VIEW seen AS SELECT 1"
        )
        execute("CREATE TABLE parted (n int) PARTITION BY LIST (n); GRANT ALL ON parted TO PUBLIC")
        execute("CREATE TABLE part PARTITION OF parted FOR VALUES IN (1)")
        assert await note(cluster, scratch_database) == ""
        names = [*(f"table{number}" for number in range(TABLES_SHOWN_MAX)), "\x1b[31mred"]
        for name in names:
            execute(
                f"CREATE TABLE {quoted(name)} (n int); GRANT SELECT ON {quoted(name)} TO PUBLIC"
            )
        found = await note(cluster, scratch_database)
        assert (
            "the role may not read or write 4 tables there (?[31mred, table0, table1, ...)" in found
        )
        assert "SCHEMA public TO" in found
        assert "USAGE" not in found
        execute(found.split("\n", 1)[1])
        assert await note(cluster, scratch_database) == ""
        execute("DROP SCHEMA public CASCADE")
        assert await note(cluster, scratch_database) == ""
    finally:
        execute(f"DROP OWNED BY {quoted(ROLE)}; DROP ROLE {quoted(ROLE)}")
