"""An administrator's connections: whose they are, and how their failures are named."""

from pathlib import Path

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.config import ConfigurationError
from proxy.emulator.endpoints import SessionEnd
from proxy.verbs.shards.administration import administering, check_target
from tests.support.catalogue import MAP, Stores
from tests.support.shards_cli import Shards


async def test_an_administrator_is_the_identity_where_clients_name_their_user(
    stores: Stores, tmp_path: Path
) -> None:
    everyone: dict[str, object] = {"user": "*"}
    sections = {"targets.main": everyone, "upstream": everyone}
    shards = Shards(stores, tmp_path, None, **sections)
    await shards.set_up()
    async with (
        administering(stores.settings(None, **sections)) as administration,
        administration.catalogue() as connection,
    ):
        assert await connection.fetchval("select user::text") == stores.roles.admin


async def test_an_error_in_the_block_names_the_database(stores: Stores) -> None:
    async with administering(stores.settings()) as administration:

        async def lose() -> None:
            async with administration.catalogue() as connection:
                stores.lakebase[MAP].endpoint.end_sessions(SessionEnd.RESET)
                await connection.execute("select pg_sleep(60)")

        with pytest.raises(CatalogueError, match="the catalogue: division by zero") as refused:
            async with administration.catalogue() as connection:
                await connection.execute("select 1 / 0")
        assert refused.value.sqlstate == "22012"
        with pytest.raises(CatalogueError, match="the catalogue: ") as refused:
            await lose()
        assert refused.value.transient


def test_settings_must_say_where_the_catalogue_is(stores: Stores) -> None:
    settings = stores.settings()
    check_target(settings)
    empty = settings.catalogue.model_copy(update={"target": ""})
    with pytest.raises(ConfigurationError) as refused:
        check_target(settings.model_copy(update={"catalogue": empty}))
    assert [problem.key for problem in refused.value.problems] == ["catalogue.target"]
