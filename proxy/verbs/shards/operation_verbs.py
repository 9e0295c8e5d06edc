"""`shards ops`: the operations that run or were left pending, and what to do with those."""

from collections.abc import Mapping
from functools import partial
from typing import Final
from uuid import UUID

from proxy.catalogue import store
from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.move import Move
from proxy.catalogue.op_log import OperationRow
from proxy.catalogue.operation import Operation
from proxy.catalogue.operations import Operator
from proxy.verbs.shards.arguments import Arguments, one_of, syntax
from proxy.verbs.shards.move_verbs import copy_command, judge_copy
from proxy.verbs.shards.operating import operating
from proxy.verbs.shards.output import described
from proxy.verbs.shards.verb import Call, Json, Verb
from proxy.verbs.syntax import UsageError

_RESUME, _UNDO = "resume", "undo"
_DONE: Final = {_RESUME: "done", _UNDO: "undone"}
_ALL, _WITHOUT_COPY = "all", "without-copy"
_USAGE: Final = (
    "ops [resume OP [--copy COMMAND [--copy-timeout-seconds N] | --without-copy]"
    " | resume --all | undo OP]"
)


def _judge(arguments: Arguments) -> None:
    copies = arguments.get("copy") is not None or _WITHOUT_COPY in arguments.switches
    word = arguments.words[0] if arguments.words else ""
    if not word and (arguments.dry_run or copies or _ALL in arguments.switches):
        raise UsageError("--dry-run, --all, --copy and --without-copy are for ops resume")
    judge_copy(arguments)
    if not word:
        return
    one_of("what ops does", word, (_RESUME, _UNDO))
    is_all = _ALL in arguments.switches
    if len(arguments.words) != (1 if is_all else 2) or (word == _UNDO and (is_all or copies)):
        raise UsageError(f"usage: lakebase-auth-proxy shards {_USAGE}")
    if is_all and copies:
        raise UsageError("--copy and --without-copy are for one operation")
    if arguments.get("copy") is not None and _WITHOUT_COPY in arguments.switches:
        raise UsageError("--copy and --without-copy exclude each other")
    if not is_all:
        _op_id(arguments)


def _op_id(arguments: Arguments) -> UUID:
    try:
        return UUID(arguments.words[1])
    except ValueError:
        raise UsageError("OP is the id of an operation, as ops prints it") from None


async def _ops(call: Call) -> None:
    map_id = None
    call.output.progress("reading the operations")
    async with call.administration.catalogue() as connection:
        await store.check_store(connection, writes=bool(call.arguments.words))
        if call.arguments.get("map") is not None:
            map_id = (await call.read_map(connection)).map_id
    async with operating(call) as operator:
        if _ALL in call.arguments.switches:
            await _resume_all(call, operator, map_id)
        elif call.arguments.words:
            await _settle(call, operator)
        else:
            _answer(call, [_facts(row, row.state) for row in await operator.pending(map_id)])


def _answer(call: Call, rows: list[Json]) -> None:
    lines: list[str] = []
    for row in rows:  # a table of them is wider than a terminal
        lines += ["", *described({**row, "progress": _progress(row)})]
    call.output.answer({"operations": rows}, lines[1:] or ["no operation is pending"])


async def _settle(call: Call, operator: Operator) -> None:
    word, op_id = call.arguments.words[0], _op_id(call.arguments)
    prepare = partial(_prepare, call)
    if call.arguments.dry_run:
        plan = await operator.plan_pending(op_id, undo=word == _UNDO, prepare=prepare)
        call.output.plan(plan)
        return
    row = await (operator.undo(op_id) if word == _UNDO else operator.resume(op_id, prepare))
    line = f"the operation {op_id} ({row.kind}) is {_DONE[word]}"
    call.output.answer({"operations": [_facts(row, _DONE[word])]}, [line])


def _prepare(call: Call, operation: Operation) -> None:
    """Set the copy command of a move, which its row does not have. Warn if it is not run."""
    command = copy_command(call)
    if isinstance(operation, Move) and not operation.is_copied:
        if command or _WITHOUT_COPY in call.arguments.switches:
            operation.copy_with(None if command is None else command.run)
    elif command:
        text = f"the copy command is not run: the {operation.kind} is at {operation.state}"
        call.output.warn(text)


async def _resume_all(call: Call, operator: Operator, map_id: UUID | None) -> None:
    """Complete all operations, those of one map or of all. Raises all refusals as one."""
    done: list[Json] = []
    plan: list[str] = []
    failures: list[CatalogueError] = []
    for row in await operator.pending(map_id):
        try:
            if call.arguments.dry_run:
                plan += await operator.plan_pending(row.op_id, undo=False)
            else:
                done.append(_facts(await operator.resume(row.op_id), _DONE[_RESUME]))
        except CatalogueError as error:
            failures.append(error)
    if failures:
        is_plan = call.arguments.dry_run
        words = "can be completed, {} cannot" if is_plan else "are done, {} are not"
        raise _summed_up(f"{len(plan or done)} operations {words}", failures)
    if call.arguments.dry_run:
        call.output.plan(plan)
    else:
        _answer(call, done)


def _summed_up(counts: str, failures: list[CatalogueError]) -> CatalogueError:
    """Return one refusal for all operations that are still pending."""
    first = failures[0]
    text = "\n  ".join(
        [
            f"{counts.format(len(failures))}:",
            *(one.message for one in failures),
        ]
    )
    hints = "\n  ".join(dict.fromkeys(one.hint for one in failures if one.hint))
    return first.with_text(text, hints)


def _facts(row: OperationRow, state: str) -> Json:
    """Return an operation as JSON has it."""
    is_pending = state == row.state
    progress = {**row.progress, "seconds_in_state": round(row.seconds_in_state, 1)}
    return {
        "op": str(row.op_id),
        "kind": row.kind,
        "state": state,
        "map": row.map_name,
        "owner": row.owner,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
        "progress": progress if is_pending else {},
    }


def _progress(facts: Json) -> str:
    """Return the progress of an operation in words."""
    progress = facts["progress"]
    assert isinstance(progress, dict)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in progress.items())


VERBS: Final[Mapping[str, Verb]] = {
    "ops": Verb(
        syntax(
            _USAGE,
            0,
            2,
            options=("copy", "copy-timeout-seconds"),
            switches=(_ALL, _WITHOUT_COPY),
            writes=True,
        ),
        _ops,
        _judge,
        of_a_map=lambda _: False,
    ),
}
