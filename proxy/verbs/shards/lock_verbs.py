"""`shards lock`, `unlock`: who alone may change a mapping for a while."""

from collections.abc import Mapping
from typing import Final
from uuid import uuid4

from proxy.catalogue.bounds import in_words, parse_bounds
from proxy.catalogue.locks import lock_mapping, unlock_all, unlock_mapping
from proxy.catalogue.model import CatalogueMap, Connection
from proxy.verbs.shards.arguments import Arguments, syntax
from proxy.verbs.shards.operating import in_catalogue
from proxy.verbs.shards.verb import Call, Verb
from proxy.verbs.syntax import UsageError

_SECONDS: Final = 3600
_SECONDS_MAX: Final = 30 * 86_400
_LABEL_MAX: Final = 200
_FORCE: Final = "force"


def _judge_lock(arguments: Arguments) -> None:
    _seconds(arguments)
    arguments.expect()
    label = arguments.get("label") or ""
    if len(label) > _LABEL_MAX or not label.isprintable():
        raise UsageError(f"--label is a text of {_LABEL_MAX} printable characters at most")


def _seconds(arguments: Arguments) -> int:
    """Return how long a lock is in force. Raises UsageError."""
    return arguments.number("expires-seconds", 1, _SECONDS_MAX) or _SECONDS


async def _lock(call: Call) -> None:
    token, expect = uuid4(), call.arguments.expect()
    seconds, label = _seconds(call.arguments), call.arguments.get("label") or ""

    async def change(connection: Connection, owner: CatalogueMap) -> str:
        bounds = parse_bounds(call.arguments.words, owner.spec)
        await lock_mapping(
            connection, owner, bounds, token, label=label, seconds=seconds, expect=expect
        )
        return in_words(owner.spec, *bounds)

    call.output.progress("locking the mapping")
    bounds = await in_catalogue(call, change)
    if call.arguments.dry_run:
        call.output.plan([f"Lock the mapping {bounds} in the catalogue, for {seconds} s."])
        return
    lines = [f"locked the mapping {bounds} for {seconds} s; its token:", str(token)]
    call.output.answer({"token": str(token)}, lines)


def _judge_unlock(arguments: Arguments) -> None:
    forced = _FORCE in arguments.switches
    if (arguments.token() is not None) is forced or (forced and not arguments.words):
        raise UsageError("unlock needs --token T, or RANGE and --force")
    if arguments.expect() is not None and not arguments.words:
        raise UsageError("--expect is for one RANGE")


async def _unlock(call: Call) -> None:
    token, expect = call.arguments.token(), call.arguments.expect()
    earlier = 0  # by a try whose answer was lost

    async def change(connection: Connection, owner: CatalogueMap) -> int:
        nonlocal earlier
        if call.arguments.words:
            bounds = parse_bounds(call.arguments.words, owner.spec)
            found = await unlock_mapping(connection, owner, bounds, token, expect)
        else:
            assert token is not None  # it was judged
            found = await unlock_all(connection, owner, token)
        earlier = max(earlier, found)
        return earlier

    call.output.progress("unlocking")
    unlocked = await in_catalogue(call, change)
    if call.arguments.dry_run:
        call.output.plan([f"Unlock {unlocked} mappings in the catalogue."] if unlocked else [])
        return
    call.output.answer({"unlocked": unlocked}, [f"unlocked {unlocked} mappings"])


VERBS: Final[Mapping[str, Verb]] = {
    "lock": Verb(
        syntax(
            "lock RANGE [--label TEXT] [--expires-seconds 3600] [--expect EPOCH]",
            1,
            2,
            options=("label", "expires-seconds", "expect"),
            writes=True,
        ),
        _lock,
        _judge_lock,
    ),
    "unlock": Verb(
        syntax(
            "unlock RANGE --token T | --force [--expect EPOCH], or unlock --token T",
            0,
            2,
            options=("expect", "token"),
            switches=(_FORCE,),
            writes=True,
        ),
        _unlock,
        _judge_unlock,
    ),
}
