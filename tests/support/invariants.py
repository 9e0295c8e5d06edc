"""What must hold of a shard map at every moment: I1 to I4 of the shard maps' document.

I1: at most one shard has given keys online. I2: a shard admits by its own row only. I3: no session
of an older epoch lives where data are copied from, or where keys have gone from. I4: the epoch of a
shard's row is not below the catalogue's.
"""

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from proxy.catalogue.operation_kinds import KINDS
from proxy.routing.keys import HASH_BYTES
from tests.support.catalogue import MAP, SHARD_NAMES

if TYPE_CHECKING:
    from tests.support.operating import Operating

# From this state of a move on, the sessions of before are proven to have ended.
DRAINED: Final = "drained"
_LIVE: Final = (
    "select pid, mapping_id, epoch, key from shardmap_local.live_session where key is not null"
)
_MOVES: Final = "select kind, state, body from shardmap.op_log where kind = 'move'"


async def check_invariants(operating: "Operating", *, recovering: bool = False) -> None:
    """Fail unless I1 to I4 hold.

    `recovering`: the rows of catalogue and shards differ, as after a restore, and I1 and I3 must
    hold all the same.
    """
    local = {name: await operating.local(name) for name in SHARD_NAMES}
    catalogue = await operating.fetch(MAP, "select * from shardmap.mapping")
    _check_one_shard(local)
    await _check_sessions(operating, local, catalogue)
    if recovering:
        return
    epochs = {row["mapping_id"]: row["epoch"] for rows in local.values() for row in rows}
    for row in catalogue:
        held = epochs.get(row["mapping_id"])
        assert row["op_id"] is not None or held is not None, "I4: the shard has the row"
        assert held is None or held >= row["epoch"], "I4: the shard's epoch is not lower"
    for row in catalogue:
        await _check_admission(operating, local, row)


async def check_settled(operating: "Operating") -> None:
    """Fail unless the invariants hold and nothing is left: both sides have the same rows."""
    await check_invariants(operating)
    assert await operating.fetch(MAP, "select kind, state from shardmap.op_log") == []
    shards = await operating.fetch(MAP, "select * from shardmap.shard")
    rows = await operating.fetch(MAP, "select * from shardmap.mapping")
    assert all(row["op_id"] is None for row in [*shards, *rows])
    for name in SHARD_NAMES:
        identities = await operating.fetch(name, "select * from shardmap_local.identity")
        mine = [
            one
            for one in shards
            if one["host"] == operating.stores.host(name)
            or one["host"] == operating.shards[name].host
        ]
        if not mine and all(is_detached(one) for one in identities):
            continue
        assert [(one["shard_id"], one["status"]) for one in identities] == [
            (one["shard_id"], one["status"]) for one in mine
        ]
        for own, row in zip(identities, mine, strict=True):
            assert abs(own["version"]) >= row["version"], "the shard's own version is not lower"
        ids = {one["shard_id"] for one in mine}
        expected = {_compared(row) for row in rows if row["shard_id"] in ids}
        assert {_compared(row) for row in await operating.local(name)} == expected, name


def is_detached(identity: Any) -> bool:
    """Return whether a shard says of itself that it is offline until it is repaired."""
    return bool(identity["status"] == "offline" and identity["version"] < 0)


def _compared(row: Any) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("mapping_id", "lo", "hi", "status", "epoch"))


def _check_one_shard(local: dict[str, list[Any]]) -> None:
    online = sorted(
        (row["lo"], row["hi"], name)
        for name, rows in local.items()
        for row in rows
        if row["status"] == "online"
    )
    for (_, hi, one), (lo, _, other) in pairwise(online):
        assert hi is not None, f"I1: {one} and {other} both have keys online"
        assert hi <= lo, f"I1: {one} and {other} both have keys online"


async def _check_sessions(
    operating: "Operating", local: dict[str, list[Any]], catalogue: list[Any]
) -> None:
    """Check I3: who lives in a shard has a key that is there, and nowhere else."""
    drained = await _drained(operating)
    for name in SHARD_NAMES:
        for session in await operating.fetch(name, _LIVE):
            key, what = session["key"], f"I3: pid {session['pid']} lives on {name}"
            own = [row for row in local[name] if row["mapping_id"] == session["mapping_id"]]
            assert [one for one in own if _covers(one, key)], f"{what}, where no fence finds it"
            for row in catalogue:
                if _covers(row, key):
                    assert operating.name_of(row["shard_id"]) == name, f"{what}; flipped"
            for other, rows in local.items():
                for row in rows if other != name else ():
                    is_online = row["status"] == "online" and _covers(row, key)
                    assert not is_online, f"{what}; {other} has its key online"
            for mapping_id, source, epoch in drained:
                if (mapping_id, source) == (str(session["mapping_id"]), name):
                    assert session["epoch"] > epoch, f"{what}; its mapping is drained"


async def _drained(operating: "Operating") -> list[tuple[str, str, int]]:
    """Return mapping, source and first epoch of the moves that have proven their source empty."""
    found = []
    for row in await operating.fetch(MAP, _MOVES):
        states = [step.name for step in KINDS[row["kind"]].steps]
        if row["state"] in states[states.index(DRAINED) :]:
            mapping = json.loads(row["body"])["mapping"]
            source = operating.name_of(mapping["shard_id"])
            found.append((mapping["mapping_id"], source, mapping["epoch"]))
    return found


def _covers(row: Any, key: bytes) -> bool:
    return bool(row["lo"] <= key and (row["hi"] is None or key < row["hi"]))


async def _check_admission(operating: "Operating", local: dict[str, list[Any]], row: Any) -> None:
    """Check I2: the shard admits by its own row, whatever the catalogue says."""
    name = operating.name_of(row["shard_id"])
    found = [one for one in local[name] if one["mapping_id"] == row["mapping_id"]]
    (identity,) = await operating.fetch(
        name, "select status, location from shardmap_local.identity"
    )
    key = row["lo"] or b"\0" * HASH_BYTES
    connection = await operating.connected(name, operating.stores.roles.session)
    await connection.execute("begin")
    try:
        verdict = (await operating.admit(connection, name, row, key))["verdict"]
    except asyncpg.InsufficientPrivilegeError:
        return  # no session starts
    finally:
        await connection.execute("rollback")
    expected = (
        bool(found)
        and identity["location"] == operating.shards[name].location
        and found[0]["status"] == identity["status"] == "online"
        and found[0]["epoch"] == row["epoch"]
        and _covers(found[0], key)
    )
    assert (verdict == "ok") == expected, f"I2: {verdict}, but the shard has {found}"
