"""`shards split`, `merge`: what they answer and what they refuse."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.catalogue.merge import RUN_MAX
from proxy.exit_codes import EXIT_OK
from proxy.verbs.shards import read
from proxy.verbs.syntax import UsageError
from tests.support.catalogue import Stores
from tests.support.shards_cli import Shards

OTHER = "a6f6b1a2-0000-4000-8000-000000000000"


@pytest_asyncio.fixture
async def shards(stores: Stores, tmp_path: Path) -> AsyncIterator[Shards]:
    found = Shards(stores, tmp_path)
    await found.set_up()
    yield found


def row(low: str, high: str, epoch: int, shard: str = "one") -> dict[str, Any]:
    where = {"low": low, "high": high, "shard": shard}
    return {**where, "status": "online", "epoch": epoch, "locked": False, "op": None}


async def shown(shards: Shards) -> list[tuple[str, str]]:
    rows = (await shards.done("show"))["mappings"]
    return [(row["low"], row["high"]) for row in rows]


async def refused(shards: Shards, *arguments: str) -> tuple[str, str]:
    """Return reason and SQLSTATE, of a dry run as well; no operation has begun."""
    before = await shards.done("show")
    found = await shards.refused(*arguments)
    assert await shards.refused(*arguments, "--dry-run") == found
    assert await shards.done("show") == before
    assert (await shards.done("ops"))["operations"] == []
    return found


async def test_s12_split_and_merge_a_range(shards: Shards) -> None:
    await shards.add("-inf", "+inf", "one")
    dry = await shards.done("split", "-5", "--dry-run")
    assert (dry["dry_run"], len(dry["plan"])) == (True, 2)
    assert await shown(shards) == [("-inf", "+inf")]
    facts = await shards.done("split", "-5", "--expect", "1")
    assert facts == {"mappings": [row("-inf", "-5", 2), row("-5", "+inf", 2)]}
    facts = await shards.done("split", "10")
    assert facts == {"mappings": [row("-5", "10", 3), row("10", "+inf", 3)]}
    assert len((await shards.done("merge", "10", "--dry-run"))["plan"]) == 2
    facts = await shards.done("merge", "10")
    assert facts == {"mappings": [row("-5", "+inf", 4)], "merged": 2}
    assert await shown(shards) == [("-inf", "-5"), ("-5", "+inf")]


async def test_s12_split_a_hash_map_at_a_number(stores: Stores, tmp_path: Path) -> None:
    shards = Shards(stores, tmp_path)
    await shards.set_up("hash")
    await shards.add("0", "+inf", "one")
    for number in ("1073741824", "0x80000000"):
        await shards.done("split", number)
    assert await shown(shards) == [
        ("0x00000000", "0x40000000"),
        ("0x40000000", "0x80000000"),
        ("0x80000000", "+inf"),
    ]
    assert await refused(shards, "split", "0x40000000") == ("not_inside", "22023")
    facts = await shards.done("merge", "0x40000000")
    assert facts["mappings"][0]["high"] == "0x80000000"


async def test_s12_what_cannot_be_is_refused_and_nothing_begins(shards: Shards) -> None:
    await shards.add("0", "10", "one")
    await shards.add("10", "20", "two")
    await shards.add("30", "40", "two")
    for key in ("0", "10", "20", "40", "+inf"):
        assert await refused(shards, "split", key) == ("not_inside", "22023")
    for key in ("25", "50", "-inf"):
        assert await refused(shards, "split", key) == ("mapping_not_found", "3D000")
    for key in ("10", "20", "30", "5"):
        assert await refused(shards, "merge", key) == ("not_adjacent", "22023")
    for key in ("25", "-1"):
        assert await refused(shards, "merge", key) == ("mapping_not_found", "3D000")
    assert (await refused(shards, "split", "x"))[0] == "key_invalid"
    assert await refused(shards, "split", "5", "--expect", "2") == ("stale_epoch", "40001")
    token = (await shards.done("lock", "0", "10"))["token"]
    assert await refused(shards, "split", "5") == ("locked", "55P03")
    assert await refused(shards, "split", "5", "--token", OTHER) == ("lock_not_owned", "55P03")
    facts = await shards.done("split", "5", "--token", token)
    assert [one["locked"] for one in facts["mappings"]] == [True, True]
    assert await refused(shards, "merge", "5") == ("locked", "55P03")
    assert await shards.done("unlock", "--token", token) == {"unlocked": 2}
    # The epoch of what begins at KEY, as `lookup KEY` shows it.
    await shards.done("offline", "5", "10")
    await shards.done("online", "5", "10")
    assert await refused(shards, "merge", "5", "--expect", "2") == ("stale_epoch", "40001")
    assert (await shards.done("merge", "5", "--expect", "4"))["merged"] == 2


async def test_s12_a_list_map_has_nothing_to_split_or_merge(stores: Stores, tmp_path: Path) -> None:
    shards = Shards(stores, tmp_path)
    await shards.set_up("list")
    await shards.done("add", "7", "--shard", "one")
    assert await refused(shards, "split", "7") == ("no_split_of_a_list", "22023")
    assert await refused(shards, "merge", "7") == ("not_adjacent", "22023")
    assert await shards.done("merge", "--auto") == {"mappings": [], "merged": 0}


async def test_merge_all_that_can_be(shards: Shards) -> None:
    await shards.add("0", "100", "one")
    await shards.add("100", "200", "two")
    for key in ("20", "40", "60", "120"):
        await shards.done("split", key)
    token = (await shards.done("lock", "60", "100"))["token"]
    assert len((await shards.done("merge", "--auto", "--dry-run"))["plan"]) == 4
    facts = await shards.done("merge", "--auto", "--shard", "one")
    assert facts == {"mappings": [row("0", "60", 5)], "merged": 3}
    facts = await shards.done("merge", "--auto", "--token", token)
    assert [one["low"] for one in facts["mappings"]] == ["0", "100"]
    assert facts["merged"] == 4
    assert await shown(shards) == [("0", "100"), ("100", "200")]
    assert await shards.done("merge", "--auto") == {"mappings": [], "merged": 0}
    assert (await shards.refused("merge", "--auto", "--shard", "three"))[0] == "unknown_shard"


@pytest.mark.slow
async def test_more_than_one_operation_has_are_merged_in_turns(
    shards: Shards, tmp_path: Path
) -> None:
    file = tmp_path / "mappings.csv"
    count = RUN_MAX + 3
    lines = [f"{low},{low + 1},one" for low in range(count)]
    file.write_text("\n".join(["low,high,shard", *lines]) + "\n")
    await shards.done("add", "--file", str(file))
    facts = await shards.done("merge", "--auto")
    assert facts == {"mappings": [row("0", str(count), 3)], "merged": count}


async def test_sentences_for_people(shards: Shards) -> None:
    await shards.add("0", "10", "one")
    answered = await shards("split", "5")
    assert (answered.code, answered.out) == (
        EXIT_OK,
        "[0, 5) on shard one is a mapping (epoch 2)\n[5, 10) on shard one is a mapping (epoch 2)\n",
    )
    assert (await shards("merge", "5")).out == "[0, 10) on shard one is one mapping (epoch 3)\n"
    assert (await shards("merge", "--auto")).out == "there is none to merge\n"
    await shards("split", "5")
    assert (await shards("merge", "--auto")).out == "merged 2 mappings into 1\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("split",),
        ("split", "1", "2"),
        ("split", "1", "--token", "mine"),
        ("split", "1", "--expect", "0"),
        ("merge",),
        ("merge", "1", "--auto"),
        ("merge", "1", "--shard", "one"),
        ("merge", "--auto", "--shard", "a b"),
        ("merge", "--auto", "--token", "mine"),
        ("merge", "--auto", "--expect", "1"),
        ("merge", "1", "--expect", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_before_a_database_is_asked(
    arguments: tuple[str, ...], stores: Stores, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        read([*arguments, "--config", str(stores.file(tmp_path))])
