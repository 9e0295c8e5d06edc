"""`shards split`, `merge`: the bounds of mappings, on the shard where they are."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from proxy.catalogue.bounds import in_words, parse_bound
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.merge import Merge, Run, find_runs
from proxy.catalogue.model import CatalogueMap, Connection
from proxy.catalogue.model import Mapping as MappingRow
from proxy.catalogue.split import Split
from proxy.catalogue.store import read_shard
from proxy.catalogue.transactions import transaction
from proxy.verbs.shards.arguments import Arguments, syntax
from proxy.verbs.shards.operating import Do, run, running
from proxy.verbs.shards.verb import Call, Json, Verb, mapping_facts
from proxy.verbs.syntax import UsageError

_AUTO: Final = "auto"
# Each turn makes one mapping of up to 5,000. More of them come of others who split meanwhile.
TURNS_MAX: Final = 10
# Why a run that was found is none any more: another operator was faster.
_CHANGED: Final = frozenset(
    one.value.word for one in (Reason.NOT_ADJACENT, Reason.LOCKED, Reason.LOCK_NOT_OWNED)
)


def _key(call: Call, owner: CatalogueMap) -> bytes:
    """Return the bound that KEY is. Raises CatalogueError and ProxyError."""
    key = parse_bound(call.arguments.words[0] or "+inf", owner.spec)
    if key is None:
        raise CatalogueError(Reason.NOT_INSIDE, "KEY is above every key")
    return key


# -- split ---------------------------------------------------------------------------------------


def _judge_split(arguments: Arguments) -> None:
    arguments.expect()
    arguments.token()


async def _split(call: Call) -> None:
    expect = call.arguments.expect()

    async def make(_: Connection, owner: CatalogueMap) -> Split:
        return Split(owner, _key(call, owner), expect=expect, token=call.arguments.token())

    call.output.progress("splitting the mapping")
    if done := await run(call, make):
        (shard,) = done.operation.shards
        halves = done.operation.after, done.operation.upper
        facts = [_facts(one, done.map, shard.name) for one in halves]
        lines = [_sentence(one, done.map, shard.name, "is a mapping") for one in halves]
        call.output.answer({"mappings": facts}, lines)


# -- merge ---------------------------------------------------------------------------------------


def _judge_merge(arguments: Arguments) -> None:
    is_auto = _AUTO in arguments.switches
    if bool(arguments.words) is is_auto:
        raise UsageError("merge needs KEY or --auto, and not both")
    if arguments.shard() is not None and not is_auto:
        raise UsageError("--shard is for merge --auto")
    if arguments.expect() is not None and is_auto:
        raise UsageError("--expect is for one KEY")
    arguments.token()


async def _merge(call: Call) -> None:
    if _AUTO in call.arguments.switches:
        await _merge_all(call)
        return

    expect, token = call.arguments.expect(), call.arguments.token()

    async def make(_: Connection, owner: CatalogueMap) -> Merge:
        return Merge.at(owner, _key(call, owner), expect=expect, token=token)

    call.output.progress("merging the mappings")
    if done := await run(call, make):
        (shard,) = done.operation.shards
        after, count = done.operation.after, len(done.operation.rows)
        facts = {"mappings": [_facts(after, done.map, shard.name)], "merged": count}
        call.output.answer(facts, [_sentence(after, done.map, shard.name, "is one mapping")])


async def _merge_all(call: Call) -> None:
    """Merge all that can be, a run at a time; what was merged of a long run is merged again."""
    owner, runs = await _find_runs(call)
    merged: dict[bytes, _Merged] = {}
    async with running(call) as (operator, do):
        if call.arguments.dry_run:
            plans = [await operator.plan(_operation(owner, one)) for one in runs]
            call.output.plan([sentence for plan in plans for sentence in plan])
            return
        for _ in range(TURNS_MAX):
            is_changed = False
            for one in runs:
                operation = _operation(owner, one)
                if await _try(do, operation):
                    is_changed = True
                    counts = [merged.pop(row.lo, _ONE).mappings for row in operation.rows]
                    (shard,) = operation.shards
                    merged[one.lo] = _Merged(sum(counts), operation.after, shard.name)
            runs = (await _find_runs(call))[1] if is_changed else []
            if not runs:
                break
    found = [merged[lo] for lo in sorted(merged)]
    facts = [_facts(one.after, owner, one.shard) for one in found if one.after is not None]
    total = sum(one.mappings for one in found)
    lines = [f"merged {total} mappings into {len(found)}" if found else "there is none to merge"]
    call.output.answer({"mappings": facts, "merged": total}, lines)


class _Merged(NamedTuple):
    """What `merge --auto` has made of so many mappings."""

    mappings: int
    after: MappingRow | None = None
    shard: str = ""


_ONE: Final = _Merged(1)


async def _find_runs(call: Call) -> tuple[CatalogueMap, list[Run]]:
    call.output.progress("reading the mappings")
    name, token = call.arguments.shard(), call.arguments.token()
    async with (
        call.administration.catalogue() as connection,
        transaction(connection, read_only=True),
    ):
        owner = await call.read_map(connection, writes=True)
        shard = None if name is None else await read_shard(connection, owner, name)
        return owner, await find_runs(connection, owner, shard=shard, token=token)


def _operation(owner: CatalogueMap, one: Run) -> Merge:
    return Merge(owner, one.lo, one.hi, token=one.token)


async def _try(do: Do, operation: Merge) -> bool:
    """Return whether the run was merged; not if another operator has changed it meanwhile."""
    try:
        return await do(operation)
    except CatalogueError as error:
        if error.reason in _CHANGED and error.op_id is None:
            return False
        raise


# -- answers -------------------------------------------------------------------------------------


def _facts(row: MappingRow, owner: CatalogueMap, shard: str) -> Json:
    return mapping_facts(row, owner.spec, {row.shard_id: shard})


def _sentence(row: MappingRow, owner: CatalogueMap, shard: str, word: str) -> str:
    bounds = in_words(owner.spec, row.lo, row.hi)
    return f"{bounds} on shard {shard} {word} (epoch {row.epoch})"


VERBS: Final[Mapping[str, Verb]] = {
    "split": Verb(
        syntax(
            "split KEY [--expect EPOCH] [--token T]",
            1,
            1,
            options=("expect", "token"),
            writes=True,
        ),
        _split,
        _judge_split,
    ),
    "merge": Verb(
        syntax(
            "merge KEY [--expect EPOCH] | --auto [--shard NAME] [--token T]",
            0,
            1,
            options=("shard", "expect", "token"),
            switches=(_AUTO,),
            writes=True,
        ),
        _merge,
        _judge_merge,
    ),
}
