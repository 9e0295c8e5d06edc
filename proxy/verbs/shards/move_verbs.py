"""`shards move`, `reassign`: a mapping gets another shard."""

import os
from collections.abc import Mapping
from typing import Final

from proxy.catalogue.bounds import in_words, parse_bounds
from proxy.catalogue.copy_command import CopyCommand
from proxy.catalogue.model import CatalogueMap, Connection, SessionsMode
from proxy.catalogue.move import Move
from proxy.catalogue.reassign import Reassign, ToShard
from proxy.verbs.shards.arguments import Arguments, one_of, shard_name, syntax
from proxy.verbs.shards.operating import Done, run
from proxy.verbs.shards.verb import Call, Json, Verb, mapping_facts
from proxy.verbs.syntax import UsageError
from proxy.workspace.login_variables import without_login

_DRAIN_SECONDS: Final = 60
SECONDS_MAX: Final = 86_400
_COPY_SECONDS_MAX: Final = 30 * SECONDS_MAX
_MODES: Final = (SessionsMode.KILL, SessionsMode.DRAIN)


# -- arguments -----------------------------------------------------------------------------------


def _judge(arguments: Arguments) -> None:
    _to(arguments)
    arguments.expect()
    arguments.token()


def _judge_move(arguments: Arguments) -> None:
    _judge(arguments)
    mode, _ = _sessions(arguments)
    if arguments.get("drain-seconds") is not None and mode is not SessionsMode.DRAIN:
        raise UsageError("--drain-seconds is for --sessions drain")
    judge_copy(arguments)


def _to(arguments: Arguments) -> str:
    name = arguments.get("to")
    if name is None:
        raise UsageError("--to SHARD is needed")
    return shard_name(name)


def _sessions(arguments: Arguments) -> tuple[SessionsMode, float]:
    """Return what happens to the sessions, and for how long a drain lasts. Raises UsageError."""
    word = one_of("--sessions", arguments.get("sessions") or "kill", _MODES)
    seconds = arguments.number("drain-seconds", 0, SECONDS_MAX, _DRAIN_SECONDS)
    return SessionsMode(word), float(seconds or 0)


def judge_copy(arguments: Arguments) -> None:
    """Raise UsageError if the options of the copy command cannot be meant."""
    seconds = arguments.number("copy-timeout-seconds", 0, _COPY_SECONDS_MAX)
    command = arguments.get("copy")
    if command is not None and not command.strip():
        raise UsageError("--copy is a command for /bin/sh")
    if seconds is not None and command is None:
        raise UsageError("--copy-timeout-seconds is for --copy COMMAND")


def copy_command(call: Call) -> CopyCommand | None:
    """Return the command that copies the rows, if one was given."""
    command = call.arguments.get("copy")
    if command is None:
        return None
    seconds = call.arguments.number("copy-timeout-seconds", 0, _COPY_SECONDS_MAX, 0)
    environment = without_login(os.environ, call.settings)
    return CopyCommand(command, float(seconds or 0), call.administration.share, environment)


# -- the verbs -----------------------------------------------------------------------------------


async def _move(call: Call) -> None:
    mode, seconds = _sessions(call.arguments)
    command = copy_command(call)

    async def make(_: Connection, owner: CatalogueMap) -> Move:
        lo, hi = parse_bounds(call.arguments.words, owner.spec)
        return Move(
            owner,
            lo,
            hi,
            _to(call.arguments),
            sessions=mode,
            drain_seconds=seconds,
            copy=None if command is None else command.run,
            expect=call.arguments.expect(),
            token=call.arguments.token(),
        )

    if done := await run(call, make):
        operation = done.operation
        for warning in operation.warnings:
            call.output.warn(warning)
        ended, offline = operation.sessions_ended, round(operation.seconds_offline, 3)
        facts = {"op": str(operation.op_id), "sessions_ended": ended, "seconds_offline": offline}
        lines = [f"{ended} sessions were ended; the mapping was offline for {offline:g} s"]
        _answer(call, done, "moved", facts, lines)


async def _reassign(call: Call) -> None:
    async def make(_: Connection, owner: CatalogueMap) -> Reassign:
        lo, hi = parse_bounds(call.arguments.words, owner.spec)
        return Reassign(
            owner,
            lo,
            hi,
            _to(call.arguments),
            expect=call.arguments.expect(),
            token=call.arguments.token(),
        )

    if done := await run(call, make):
        _answer(call, done, "reassigned", {}, [])


def _answer(call: Call, done: Done[ToShard], word: str, facts: Json, lines: list[str]) -> None:
    after, spec, target = done.operation.after, done.map.spec, done.operation.target
    mapping = mapping_facts(after, spec, {target.shard_id: target.name})
    bounds = in_words(spec, after.lo, after.hi)
    line = f"{bounds} is {word} to shard {target.name}, {after.status} (epoch {after.epoch})"
    call.output.answer({"mapping": mapping, **facts}, [line, *lines])


VERBS: Final[Mapping[str, Verb]] = {
    "move": Verb(
        syntax(
            "move RANGE --to SHARD [--sessions kill|drain] [--drain-seconds 60] [--copy COMMAND]"
            " [--copy-timeout-seconds N] [--expect EPOCH] [--token T]",
            1,
            2,
            options=(
                *("to", "sessions", "drain-seconds", "copy", "copy-timeout-seconds"),
                *("expect", "token"),
            ),
            writes=True,
        ),
        _move,
        _judge_move,
    ),
    "reassign": Verb(
        syntax(
            "reassign RANGE --to SHARD [--expect EPOCH] [--token T]",
            1,
            2,
            options=("to", "expect", "token"),
            writes=True,
        ),
        _reassign,
        _judge,
    ),
}
