"""`shards verify`, `repair`, `attach`, `detach`, `relocate`: when catalogue and shards differ.

Not for: comparing and replacing rows (`catalogue.verify`, `catalogue.repair` and others).
"""

from collections.abc import Mapping
from typing import Final
from uuid import UUID

from proxy.catalogue import store
from proxy.catalogue.detach import Detach
from proxy.catalogue.differences import (
    Difference,
    Digest,
    ForeignRows,
    KeysDiffer,
    Row,
    Where,
    bounds_of,
    shown,
)
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_rows import check_version
from proxy.catalogue.model import CatalogueMap, Connection, Shard
from proxy.catalogue.pending_elsewhere import give_up_pending, lead_pending
from proxy.catalogue.rebuild import Rebuild
from proxy.catalogue.relocate import Relocate, check_same
from proxy.catalogue.repair import REPORT_SEPARATOR, Asked, Repair, Source, read_differences
from proxy.catalogue.verify import reading, verification
from proxy.exit_codes import EXIT_DIFFERENCES
from proxy.verbs.shards.arguments import Arguments, one_of, shard_name, syntax
from proxy.verbs.shards.operating import run
from proxy.verbs.shards.shard_verbs import (
    LOCATION_OPTIONS,
    LOCATION_USAGE,
    given_host,
    given_shard,
    judge_location,
)
from proxy.verbs.shards.verb import Call, Json, Verb, shard_facts
from proxy.verbs.syntax import UsageError

_PROGRESS_ROWS: Final = 1000


# -- verify --------------------------------------------------------------------------------------


async def _verify(call: Call) -> int | None:
    call.output.progress("reading the map")
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection)
        shards = await store.read_shards(connection, owner.map_id)
        names = {shard.shard_id: shard.name for shard in shards}
        if (name := call.arguments.shard()) is not None:
            shards = [await store.read_shard(connection, owner, name)]
    facts: Json = {"report": ""}
    lines = [""]
    reports, count = [], 0
    with call.output.many(facts, "differences", lines) as rows:
        for shard in shards:
            call.output.progress(f"comparing shard {shard.name}")
            digest, before = Digest(owner.map_id, shard.shard_id), count
            async with verification(call.administration, owner, shard) as verified:
                async for one in verified.differences():
                    digest.add(one)
                    rows.add([_facts(one, owner, shard, names, as_json=call.arguments.as_json)])
                    count += 1
                    if count % _PROGRESS_ROWS == 0:
                        call.output.progress(f"comparing shard {shard.name}: {count} differences")
            if count > before or len(shards) == 1:
                reports.append(digest.text())
        facts["report"] = REPORT_SEPARATOR.join(reports)
        lines[0] = _summary(len(shards), count, facts["report"])
    return EXIT_DIFFERENCES if count else None


def _summary(shards: int, count: int, report: object) -> str:
    compared = f"{shards} shard{'s' if shards != 1 else ''}"
    if not count:
        return f"nothing differs on {compared}"
    return f"{count} differences on {compared}; report {report}"


def _facts(
    found: Difference,
    owner: CatalogueMap,
    shard: Shard,
    names: Mapping[UUID, str],
    *,
    as_json: bool = True,
) -> Json:
    """Return a difference as JSON has it; for people, each side in one word."""
    low, high = bounds_of(owner.spec, found)
    where, differs, catalogue, local = _sides(found, owner, names)
    facts: Json = {"shard": shard.name, "low": low, "high": high, "where": where}
    if as_json:
        return {**facts, "differs": differs, "catalogue": catalogue, "local": local}
    return {
        **facts,
        "differs": " ".join(differs),
        "catalogue": _in_words(catalogue),
        "local": _in_words(local),
    }


def _sides(
    found: Difference, owner: CatalogueMap, names: Mapping[UUID, str]
) -> tuple[str, list[str], Json | None, Json | None]:
    """Return where, what differs, and the catalogue's and the shard's side."""
    if isinstance(found, KeysDiffer):
        sides = (_row_facts(row, owner, names) for row in (found.catalogue, found.local))
        return str(found.where), found.differs, *sides  # type: ignore[return-value]
    if isinstance(found, ForeignRows):
        local: Json = {"map_id": str(found.map_id), "mappings": found.rows}
        local["location"] = found.location
        return str(Where.SHARD), ["identity"], None, local
    catalogue: Json = {"status": found.catalogue}
    if found.local is None:
        return str(Where.CATALOGUE), ["identity"], catalogue, None
    return str(Where.BOTH), ["status"], catalogue, {"status": found.local}


def _row_facts(row: Row | None, owner: CatalogueMap, names: Mapping[UUID, str]) -> Json | None:
    if row is None:
        return None
    low, high = shown(owner.spec, row.lo, row.hi)
    return {
        "shard": names.get(row.shard_id, str(row.shard_id)),
        "mapping_id": str(row.mapping_id),
        "low": low,
        "high": high,
        "status": row.status,
        "epoch": row.epoch,
    }


def _in_words(side: Json | None) -> str:
    if side is None:
        return "-"
    names = ("shard", "status", "epoch", "map_id", "location")
    return " ".join(str(side[name]) for name in names if name in side)


# -- repair --------------------------------------------------------------------------------------


def _judge_repair(arguments: Arguments) -> None:
    source = one_of("--from", arguments.get("from") or "", list(Source))
    arguments.token()
    if "all" in arguments.switches:
        if source != Source.SHARD or arguments.shard() or arguments.get("report"):
            raise UsageError("repair --all is --from shard, without --shard and --report")
        if arguments.pairs:
            raise UsageError("--range is for --shard")
    elif arguments.shard() is None or not arguments.get("report"):
        raise UsageError("repair needs --shard NAME and --report ID, which verify prints; or --all")


async def _repair(call: Call) -> None:
    if "all" in call.arguments.switches:
        await _rebuild(call)
        return
    arguments, name = call.arguments, call.arguments.shard() or ""
    source = Source(arguments.get("from") or "")
    asked = Asked(source, arguments.get("report") or "", arguments.pairs, arguments.token())

    async def make(connection: Connection, owner: CatalogueMap) -> Repair:
        shard = await store.read_shard(connection, owner, name)
        call.output.progress(f"comparing shard {name}")
        return Repair(owner, name, asked, await read_differences(call.administration, owner, shard))

    if done := await run(call, make):
        repaired = done.operation.row_changes.repaired
        if done.operation.left:
            left = ", ".join(str(one) for one in done.operation.left)
            call.output.warn(f"maps that may be another catalogue's are left: {left}")
        call.output.answer({"repaired": repaired}, [f"repaired {repaired} differences"])


async def _rebuild(call: Call) -> None:
    async def make(_: Connection, owner: CatalogueMap) -> Rebuild:
        return Rebuild(owner, call.arguments.token())

    if done := await run(call, make):
        if conflict := done.operation.conflict():
            raise conflict
        repaired = done.operation.row_changes.repaired
        call.output.answer({"repaired": repaired}, [f"repaired {repaired} mappings"])


# -- detach, relocate ----------------------------------------------------------------------------


async def _detach(call: Call) -> None:
    name, force = call.arguments.words[0], "force" in call.arguments.switches
    token, expect = call.arguments.token(), call.arguments.expect()

    async def make(_: Connection, owner: CatalogueMap) -> Detach:
        return Detach(owner, name, force=force, expect=expect, token=token)

    call.output.progress(f"detaching the shard {name}")
    try:
        done = await run(call, make)
    except CatalogueError as error:
        gives_up = force and error.op_id is not None and not call.arguments.dry_run
        if not gives_up or not await _end_pending(call, name):
            raise
        done = await run(call, make)
    if done is not None:
        count, how = done.operation.mappings, "it is offline"
        if done.operation.reached_other:
            how = f"what answers at {done.operation.shard.location} is another database, and serves"
        elif not done.operation.fenced:
            how = "it could not be reached, and was not fenced"
        lines = [f"detached the shard {name} with its {count} mappings; {how}"]
        call.output.answer({"mappings": count}, lines)


async def _end_pending(call: Call, name: str) -> bool:
    """End what is pending on a shard that is gone. Return whether there was anything."""
    async with call.administration.catalogue() as connection:
        owner = await call.read_map(connection, writes=True)
        shard = await store.read_shard(connection, owner, name)
    check_version(shard, call.arguments.expect())
    given_up = await give_up_pending(call.administration, owner, shard)
    for row in given_up:
        text = f"the operation {row.op_id} ({row.kind}, {row.state}) is given up"
        call.output.warn(f"{text}; `shards verify` shows what it has left on other shards")
    return bool(given_up)


async def _relocate(call: Call) -> None:
    name, expect = call.arguments.words[0], call.arguments.expect()
    host = await given_host(call)
    names: dict[UUID, str] = {}

    async def make(connection: Connection, owner: CatalogueMap) -> Relocate:
        names.update(
            {one.shard_id: one.name for one in await store.read_shards(connection, owner.map_id)}
        )
        old = await store.read_shard(connection, owner, name)
        check_version(old, expect)
        new = await given_shard(call, owner, host)
        call.output.progress(f"comparing shard {name} at {new.location}")
        there = Shard(
            *(old.shard_id, old.map_id, name, new.host, new.port, new.database, new.endpoint),
            *(new.instance, new.workspace, old.status, old.version),
        )
        known = expect
        if not call.arguments.dry_run:
            led = await lead_pending(call.administration, owner, old, there)
            if led and expect is not None:  # the row has been written with them
                known = expect + 1
        async with reading(call.administration, owner, there) as verified:
            check_same(verified.itself, old, there)
            found = [one async for one in verified.differences()]
        token = call.arguments.token()
        return Relocate(owner, name, there, found, expect=known, token=token)

    call.output.progress(f"relocating the shard {name}")
    if done := await run(call, make):
        shard, owner = done.operation.shard, done.map
        found = [_facts(one, owner, shard, names) for one in done.operation.differences]
        async with call.administration.catalogue() as connection:
            counts = await store.count_mappings(connection, owner.map_id)
        lines = [f"the shard {name} is at {shard.location}; {len(found)} differences were repaired"]
        facts = shard_facts(shard, counts.get(shard.shard_id, 0))
        call.output.answer({"shard": facts, "differences": found}, lines)


def _judge_detach(arguments: Arguments) -> None:
    shard_name(arguments.words[0])
    arguments.expect()
    arguments.token()


def _judge_relocate(arguments: Arguments) -> None:
    judge_location(arguments)
    arguments.expect()
    arguments.token()


_REPAIR: Final = syntax(
    "repair --shard NAME --from catalogue|shard [--range LOW HIGH]... --report ID [--token T],"
    " or repair --all --from shard",
    options=("shard", "from", "report", "token"),
    switches=("all",),
    pairs=("range",),
    writes=True,
)
VERBS: Final[Mapping[str, Verb]] = {
    "verify": Verb(syntax("verify [--shard NAME]", options=("shard",)), _verify, Arguments.shard),
    "repair": Verb(_REPAIR, _repair, _judge_repair),
    "detach": Verb(
        syntax(
            "detach NAME [--force] [--expect VERSION] [--token T]",
            1,
            1,
            options=("expect", "token"),
            switches=("force",),
            writes=True,
        ),
        _detach,
        _judge_detach,
    ),
    "relocate": Verb(
        syntax(
            f"relocate {LOCATION_USAGE} [--expect VERSION] [--token T]",
            1,
            1,
            options=(*LOCATION_OPTIONS, "expect", "token"),
            writes=True,
        ),
        _relocate,
        _judge_relocate,
    ),
}
