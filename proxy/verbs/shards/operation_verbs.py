"""`shards ops`: the operations that run or were left pending, and what to do with those."""

from collections.abc import Mapping
from typing import Final
from uuid import UUID

from proxy.catalogue import store
from proxy.catalogue.op_log import OperationRow
from proxy.verbs.shards.arguments import Arguments, Syntax, UsageError, one_of
from proxy.verbs.shards.operating import operating
from proxy.verbs.shards.output import table
from proxy.verbs.shards.verb import Call, Json, Verb

_RESUME, _UNDO = "resume", "undo"
_DONE: Final = {_RESUME: "done", _UNDO: "undone"}
_COLUMNS: Final = ("op", "kind", "state", "map", "owner", "created_at", "updated_at")


def _judge(arguments: Arguments) -> None:
    if not arguments.words:
        if arguments.dry_run:
            raise UsageError("--dry-run is for ops resume and ops undo")
        return
    one_of("what ops does", arguments.words[0], (_RESUME, _UNDO))
    if len(arguments.words) != 2:
        raise UsageError("usage: lakebase-auth-proxy shards ops [resume OP | undo OP]")
    _op_id(arguments)


def _op_id(arguments: Arguments) -> UUID:
    try:
        return UUID(arguments.words[1])
    except ValueError:
        raise UsageError("OP is the id of an operation, as ops prints it") from None


async def _ops(call: Call) -> None:
    if call.arguments.words:
        await _settle(call)
        return
    map_id = None
    call.output.progress("reading the operations")
    async with call.administration.catalogue() as connection:
        await store.check_store(connection)
        if call.arguments.get("map") is not None:
            map_id = (await call.read_map(connection)).map_id
    async with operating(call) as operator:
        rows = [_facts(row, row.state) for row in await operator.pending(map_id)]
    lines = table(_COLUMNS, [[str(value) for value in row.values()] for row in rows])
    call.output.answer({"operations": rows}, lines if rows else ["no operation is pending"])


async def _settle(call: Call) -> None:
    word, op_id = call.arguments.words[0], _op_id(call.arguments)
    async with call.administration.catalogue() as connection:
        await store.check_store(connection, writes=True)
    async with operating(call) as operator:
        if call.arguments.dry_run:
            call.output.plan(await operator.plan_pending(op_id, undo=word == _UNDO))
            return
        row = await (operator.undo if word == _UNDO else operator.resume)(op_id)
    facts = _facts(row, _DONE[word])
    line = f"the operation {op_id} ({row.kind}) is {_DONE[word]}"
    call.output.answer({"operations": [facts]}, [line])


def _facts(row: OperationRow, state: str) -> Json:
    """Return an operation as JSON has it."""
    return {
        "op": str(row.op_id),
        "kind": row.kind,
        "state": state,
        "map": row.map_name,
        "owner": row.owner,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
    }


VERBS: Final[Mapping[str, Verb]] = {
    "ops": Verb(
        Syntax("ops [resume OP | undo OP]", 0, 2, writes=True),
        _ops,
        _judge,
        of_a_map=lambda _: False,
    ),
}
