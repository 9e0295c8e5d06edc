"""`shards add`, `delete`, `offline`, `online`: mappings, and the status of whole shards."""

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from proxy.catalogue import store
from proxy.catalogue.bounds import in_words, parse_bounds
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.fence import Registered, count_sessions
from proxy.catalogue.file_operation import AddFile, bad_lines
from proxy.catalogue.mapping_operations import AddMapping, DeleteMapping, MappingOperation
from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.catalogue.model import CatalogueMap, Connection, SessionsMode, Shard, Status
from proxy.catalogue.shard_status import TakeShardOffline, TakeShardOnline
from proxy.routing.map_builder import LineMappings, mappings_from_csv
from proxy.routing.map_rows import MapError
from proxy.verbs.shards.arguments import Arguments, one_of, syntax
from proxy.verbs.shards.operating import Done, counted_shard, run
from proxy.verbs.shards.verb import Call, Verb, mapping_facts
from proxy.verbs.syntax import UsageError

_DRAIN_SECONDS: Final = 60
_DRAIN_SECONDS_MAX: Final = 86_400
_OVERLAP: Final = " overlap"


# -- add -----------------------------------------------------------------------------------------


def _judge_add(arguments: Arguments) -> None:
    name = arguments.get("file")
    if name is None:
        if not arguments.words or arguments.shard() is None:
            raise UsageError("add needs RANGE and --shard NAME, or --file FILE")
        return
    if arguments.words or arguments.shard() is not None or "offline" in arguments.switches:
        raise UsageError("add --file takes neither RANGE nor --shard nor --offline")
    try:
        with Path(name).open(encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(f"--file {name}: {error.strerror or error}") from None


async def _add(call: Call) -> None:
    if call.arguments.get("file") is not None:
        await _add_file(call)
        return
    shard = call.arguments.shard() or ""
    status = Status.OFFLINE if "offline" in call.arguments.switches else Status.ONLINE

    async def make(connection: Connection, owner: CatalogueMap) -> AddMapping:
        lo, hi = parse_bounds(call.arguments.words, owner.spec)
        return AddMapping(owner, lo, hi, shard, status=status)

    if done := await run(call, make):
        _answer_mapping(call, done, f"added, {status}")


async def _add_file(call: Call) -> None:
    path = Path(call.arguments.get("file") or "")

    async def make(connection: Connection, owner: CatalogueMap) -> AddFile:
        call.output.progress(f"reading {path}")
        shards = await store.read_shards(connection, owner.map_id)
        return AddFile(owner, _read_file(path, owner, shards))

    if done := await run(call, make):
        added = len(done.operation)
        call.output.answer({"added": added}, [f"added {added} mappings"])


def _read_file(path: Path, owner: CatalogueMap, shards: list[Shard]) -> LineMappings:
    """Return the mappings of a file. Raises CatalogueError, with each bad line."""
    try:
        with _lines(path) as lines:
            return mappings_from_csv(lines, owner.spec, [shard.name for shard in shards])
    except MapError as error:
        named = [one for one in error.problems if one.startswith("line")]
        only_overlaps = bool(named) and all(one.endswith(_OVERLAP) for one in named)
        reason = Reason.OVERLAP if only_overlaps else Reason.INVALID_BOUNDS
        raise CatalogueError(reason, bad_lines(error.problems)) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CatalogueError(Reason.INVALID_BOUNDS, f"{path}: {error}") from None


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[str]]:
    with path.open(encoding="utf-8-sig", newline="") as opened:
        yield iter(opened)


# -- delete, offline, online ---------------------------------------------------------------------


def _judge_change(arguments: Arguments) -> None:
    arguments.expect()
    arguments.token()


async def _delete(call: Call) -> None:
    expect = call.arguments.expect()

    async def make(connection: Connection, owner: CatalogueMap) -> DeleteMapping:
        lo, hi = parse_bounds(call.arguments.words, owner.spec)
        return DeleteMapping(owner, lo, hi, expect=expect, token=call.arguments.token())

    if done := await run(call, make):
        _answer_mapping(call, done, "deleted")


def _judge_status(arguments: Arguments) -> None:
    if bool(arguments.words) is (arguments.shard() is not None):
        raise UsageError("RANGE or --shard NAME is needed, and not both")
    if arguments.token() is not None and not arguments.words:
        raise UsageError("--token is for RANGE: a lock is of a mapping")
    arguments.expect()


def _judge_offline(arguments: Arguments) -> None:
    _judge_status(arguments)
    mode, _ = _sessions(arguments)
    if arguments.get("drain-seconds") is not None and mode is not SessionsMode.DRAIN:
        raise UsageError("--drain-seconds is for --sessions drain")


def _sessions(arguments: Arguments) -> tuple[SessionsMode, float]:
    """Return what happens to the sessions, and for how long a drain lasts. Raises UsageError."""
    word = one_of("--sessions", arguments.get("sessions") or "kill", list(SessionsMode))
    seconds = arguments.number("drain-seconds", 0, _DRAIN_SECONDS_MAX, _DRAIN_SECONDS)
    return SessionsMode(word), float(seconds or 0)


async def _offline(call: Call) -> None:
    mode, seconds = _sessions(call.arguments)
    expect = call.arguments.expect()
    if (name := call.arguments.shard()) is not None:
        await _shard_offline(call, name, mode, seconds)
        return

    async def make(connection: Connection, owner: CatalogueMap) -> TakeOffline:
        lo, hi = parse_bounds(call.arguments.words, owner.spec)
        return TakeOffline(
            owner,
            lo,
            hi,
            sessions=mode,
            drain_seconds=seconds,
            expect=expect,
            token=call.arguments.token(),
        )

    if done := await run(call, make):
        ended = done.operation.sessions_ended
        _answer_mapping(call, done, "offline", {"sessions_ended": ended})


async def _shard_offline(call: Call, name: str, mode: SessionsMode, seconds: float) -> None:
    async def make(connection: Connection, owner: CatalogueMap) -> TakeShardOffline:
        operation = TakeShardOffline(
            owner,
            name,
            sessions=mode,
            drain_seconds=seconds,
            expect=call.arguments.expect(),
        )
        shard = await store.read_shard(connection, owner, name)
        if shard.status is Status.OFFLINE and mode is not SessionsMode.KEEP:
            async with call.administration.shard(shard) as there:
                which = Registered.of_map(owner.map_id)
                operation.has_sessions = await count_sessions(there, which) > 0
        return operation

    if done := await run(call, make):
        ended = done.operation.sessions_ended
        await _answer_shard(call, done.map, done.operation.after, {"sessions_ended": ended})


async def _online(call: Call) -> None:
    expect = call.arguments.expect()
    if (name := call.arguments.shard()) is not None:
        await _shard_online(call, name)
        return

    async def make(connection: Connection, owner: CatalogueMap) -> TakeOnline:
        lo, hi = parse_bounds(call.arguments.words, owner.spec)
        return TakeOnline(owner, lo, hi, expect=expect, token=call.arguments.token())

    if done := await run(call, make):
        _answer_mapping(call, done, "online")


async def _shard_online(call: Call, name: str) -> None:
    async def make(connection: Connection, owner: CatalogueMap) -> TakeShardOnline:
        return TakeShardOnline(owner, name, expect=call.arguments.expect())

    if done := await run(call, make):
        await _answer_shard(call, done.map, done.operation.after)


# -- answers -------------------------------------------------------------------------------------


def _answer_mapping(
    call: Call,
    done: Done[MappingOperation],
    word: str,
    more: Mapping[str, object] | None = None,
) -> None:
    """Answer with the mapping as the operation left it."""
    operation, spec = done.operation, done.map.spec
    (shard,) = operation.shards
    after = operation.after
    facts = mapping_facts(after, spec, {shard.shard_id: shard.name})
    was = "" if done.changed else " already"
    line = f"{in_words(spec, after.lo, after.hi)} on shard {shard.name} is{was} {word}"
    lines = [f"{line} (epoch {after.epoch})", *_ended(more)]
    call.output.answer({"mapping": facts, **(more or {})}, lines)


async def _answer_shard(
    call: Call, owner: CatalogueMap, shard: Shard, more: Mapping[str, object] | None = None
) -> None:
    """Answer with the shard as the operation left it."""
    facts = await counted_shard(call, owner, shard)
    lines = [f"shard {shard.name} is {shard.status} (version {shard.version})", *_ended(more)]
    call.output.answer({"shard": facts, **(more or {})}, lines)


def _ended(more: Mapping[str, object] | None) -> list[str]:
    return [f"{more['sessions_ended']} sessions were ended"] if more else []


VERBS: Final[Mapping[str, Verb]] = {
    "add": Verb(
        syntax(
            "add RANGE --shard NAME [--offline], or add --file FILE",
            0,
            2,
            options=("shard", "file"),
            switches=("offline",),
            writes=True,
        ),
        _add,
        _judge_add,
    ),
    "delete": Verb(
        syntax(
            "delete RANGE [--expect EPOCH] [--token T]",
            1,
            2,
            options=("expect", "token"),
            writes=True,
        ),
        _delete,
        _judge_change,
    ),
    "offline": Verb(
        syntax(
            "offline RANGE | --shard NAME [--sessions kill|drain|keep] [--drain-seconds 60]"
            " [--expect EPOCH] [--token T]",
            0,
            2,
            options=("shard", "sessions", "drain-seconds", "expect", "token"),
            writes=True,
        ),
        _offline,
        _judge_offline,
    ),
    "online": Verb(
        syntax(
            "online RANGE | --shard NAME [--expect EPOCH] [--token T]",
            0,
            2,
            options=("shard", "expect", "token"),
            writes=True,
        ),
        _online,
        _judge_status,
    ),
}
