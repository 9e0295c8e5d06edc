"""`shards lock`, `unlock`, and `--token` of the verbs that change a mapping."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.verbs.shards import read
from proxy.verbs.shards.output import Output
from proxy.verbs.shards.verb import Call
from proxy.verbs.syntax import UsageError
from tests.support.catalogue import Stores
from tests.support.direct_verbs import DirectAdministration, Servers
from tests.support.operating import LosingConnection, Slept
from tests.support.shards_cli import Shards

OTHER = "a6f6b1a2-0000-4000-8000-000000000000"


@pytest_asyncio.fixture
async def shards(stores: Stores, tmp_path: Path) -> Shards:
    found = Shards(stores, tmp_path)
    await found.set_up()
    await found.add("0", "10", "one")
    await found.add("10", "20", "one")
    return found


async def locked(shards: Shards) -> list[bool]:
    return [row["locked"] for row in (await shards.done("show"))["mappings"]]


async def test_s13_lock_change_and_unlock(shards: Shards) -> None:
    planned = await shards.done("lock", "0", "10", "--dry-run")
    assert (planned["dry_run"], len(planned["plan"])) == (True, 1)
    assert await locked(shards) == [False, False]
    facts = await shards.done("lock", "0", "10", "--label", "a copy", "--expires-seconds", 600)
    token = facts.pop("token")
    assert facts == {}
    assert await locked(shards) == [True, False]

    refused = [
        await shards.refused("lock", "0", "10"),
        await shards.refused("lock", "0", "10", "--dry-run"),
        await shards.refused("offline", "0", "10"),
        await shards.refused("offline", "0", "10", "--dry-run"),
    ]
    assert refused == [("locked", "55P03")] * 4
    assert await shards.refused("offline", "0", "10", "--token", OTHER) == (
        "lock_not_owned",
        "55P03",
    )
    for verb in ("offline", "online", "offline", "delete"):
        facts = await shards.done(verb, "0", "10", "--token", token)
        assert facts["mapping"]["locked"] is True


async def test_s13_unlock_in_each_of_its_forms(shards: Shards) -> None:
    token = (await shards.done("lock", "0", "10"))["token"]
    other = (await shards.done("lock", "10", "20"))["token"]
    assert await shards.refused("unlock", "0", "10", "--token", other) == (
        "lock_not_owned",
        "55P03",
    )
    assert (await shards.done("unlock", "--token", token, "--dry-run"))["plan"] == [
        "Unlock 1 mappings in the catalogue."
    ]
    assert await locked(shards) == [True, True]
    assert await shards.done("unlock", "--token", token) == {"unlocked": 1}
    assert await locked(shards) == [False, True]
    assert await shards.done("unlock", "10", "20", "--force") == {"unlocked": 1}
    assert await shards.done("unlock", "10", "20", "--token", other) == {"unlocked": 0}
    assert (await shards.refused("unlock", "10", "30", "--force"))[0] == "unknown_mapping"
    answered = await shards("lock", "0", "10")
    sentence, token, _ = answered.out.split("\n")
    assert sentence == "locked the mapping [0, 10) for 3600 s; its token:"
    assert (await shards("unlock", "0", "10", "--token", token)).out == "unlocked 1 mappings\n"


async def test_a_lock_is_given_and_taken_at_the_epoch_that_was_seen(shards: Shards) -> None:
    await shards.done("offline", "0", "10")
    stale, known = ("--expect", "1"), ("--expect", "2")
    assert await shards.refused("lock", "0", "10", *stale) == ("stale_epoch", "40001")
    assert await shards.refused("lock", "0", "10", *stale, "--dry-run") == ("stale_epoch", "40001")
    token = ("--token", (await shards.done("lock", "0", "10", *known))["token"])
    for whose in (token, ("--force",)):
        refused = await shards.refused("unlock", "0", "10", *whose, *stale)
        assert refused == ("stale_epoch", "40001")
    assert await locked(shards) == [True, False]
    assert await shards.done("unlock", "0", "10", *token, *known) == {"unlocked": 1}


class Losing(DirectAdministration):
    """Loses the answer to the next commit in the catalogue."""

    loses_next_answer = True

    @asynccontextmanager
    async def catalogue(self) -> AsyncIterator[Any]:
        async with super().catalogue() as connection:
            yield LosingConnection(self, connection)


@pytest.mark.parametrize("by_range", [False, True])
async def test_s28_an_unlock_whose_answer_was_lost_says_what_it_did(
    shards: Shards, by_range: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    token = (await shards.done("lock", "0", "10"))["token"]
    words = ["unlock", *(("0", "10") if by_range else ()), "--token", token, "--json"]
    verb, parsed, settings = read([*words, "--config", shards.config])
    administration = Losing(settings, Servers.of(shards.stores, shards.config))
    capsys.readouterr()
    await verb.run(Call(parsed, administration, Output(as_json=True), sleep=Slept()))
    assert json.loads(capsys.readouterr().out) == {"ok": True, "unlocked": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ("lock",),
        ("lock", "0", "10", "--expires-seconds", "0"),
        ("lock", "0", "10", "--expires-seconds", "1e9"),
        ("lock", "0", "10", "--label", "a\nb"),
        ("unlock",),
        ("unlock", "--force"),
        ("unlock", "--token", OTHER, "--expect", "1"),
        ("lock", "0", "10", "--expect", "0"),
        ("unlock", "0", "10"),
        ("unlock", "0", "10", "--token", "7"),
        ("unlock", "0", "10", "--token", OTHER, "--force"),
        ("offline", "0", "10", "--token", "mine"),
        ("offline", "--shard", "one", "--token", OTHER),
        ("online", "--shard", "one", "--token", OTHER),
        ("delete", "0", "10", "--token", ""),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_before_a_database_is_asked(
    arguments: tuple[str, ...], stores: Stores, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        read([*arguments, "--config", str(stores.file(tmp_path))])
