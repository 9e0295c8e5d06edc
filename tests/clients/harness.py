"""Runs the programs of some languages twice, directly and through the proxy, and compares them.

Each program is asked alone, so that what the proxy counts is its own. What takes waiting is done
for all of them together: their pools stay open while tokens expire, the compute sleeps and the
server restarts.
"""

import asyncio
import re
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from proxy.emulator.cluster import DATABASE
from proxy.emulator.lakebase import SHARDS
from proxy.errors import ErrorKind, ErrorRow
from tests.clients.record import PASSED
from tests.clients.registry import CHECKS, Client, Language
from tests.clients.running_client import RunningClient, started
from tests.clients.stage import KEY, OTHER_KEY, ROLELESS_KEY, UNCOVERED_KEY, Stage, stage

_ERROR, _CANNOT = "error: ", "cannot: "
BUILD_SECONDS_MAX: Final = 600.0


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a check: what it is directly, if that differs, and what it must print."""

    check: str
    command: str
    words: str = ""  # an expression that the answer's words match; empty: any answer
    direct: str | None = None


_OPTION: Final = "lakebase.shard_key"
STEPS: Final = (
    Step("connects", "connect", f"{DATABASE} 1"),
    Step("key in the name", f"key_in_name app@{KEY}", SHARDS[0], f"key_in_name {DATABASE}"),
    Step("key in the name", f"key_in_name app@{OTHER_KEY}", SHARDS[1], ""),
    Step("key in options", f"key_in_options {_OPTION}={KEY}", SHARDS[0]),
    Step("key in options", f"key_in_options {_OPTION}={OTHER_KEY}", SHARDS[1], ""),
    Step("types", "types"),
    Step("prepared", "prepared"),
    Step("cursor", "cursor", "100000 5000050000"),
    Step("COPY", "copy"),
    Step("rollback", "rollback"),
    Step("cancel", "cancel", "(57014|cancelled) 1"),
)
POOL: Final = Step("tokens", "pool", "20")
AGAIN: Final = "again", "40"
REFUSALS: Final = (
    (f"refused app@{UNCOVERED_KEY}", ErrorKind.MAPPING_NOT_FOUND),
    (f"refused app@{ROLELESS_KEY}", ErrorKind.TOKEN_REJECTED),
)


@dataclass(slots=True)
class Outcome:
    """What one client did: its version, and a word for each check; what is wrong in `failures`."""

    client: Client
    version: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def settle(self, check: str, wrong: str, cannot: str = "") -> None:
        """Record a step: a check passed if all of its steps did."""
        if wrong:
            self.failures.append(f"{check}: {wrong}")
        said = wrong or cannot or PASSED
        if self.cells.get(check, PASSED) == PASSED:
            self.cells[check] = said


@dataclass(frozen=True, slots=True)
class Pair:
    """One program twice: directly and through the proxy."""

    outcome: Outcome
    direct: RunningClient
    proxied: RunningClient

    async def take(self, step: Step) -> None:
        """Ask both, and record what differs, or is not as it must be."""
        direct = step.command if step.direct is None else step.direct
        if direct:
            expected, answer = await asyncio.gather(
                self.direct.ask(direct), self.proxied.ask(step.command)
            )
        else:
            expected = answer = await self.proxied.ask(step.command)
        if answer and answer[0].startswith(_CANNOT) and answer == expected:
            return self.outcome.settle(step.check, "", answer[0].removeprefix(_CANNOT))
        errors = any(line.startswith(_ERROR) for line in answer)
        words = " ".join(" ".join(answer).split())
        as_demanded = re.fullmatch(step.words or ".+", words)
        wrong = errors or answer != expected or not as_demanded
        said = f"{step.command}: directly {expected}, through the proxy {answer}"
        return self.outcome.settle(step.check, said if wrong else "")

    async def be_refused(self, command: str, row: ErrorRow) -> None:
        """Look for what the user of a driver sees of a refusal."""
        shown = " ".join(await self.proxied.ask(command))
        hint = row.hint.partition("{")[0].strip()
        wrong = "" if row.message in shown else f"{command}: no message in {shown!r}"
        seen = {"hint": hint, "SQLSTATE": row.sqlstate}
        unseen = [name for name, text in seen.items() if text not in shown]
        less = ", ".join(["message", *(name for name in seen if name not in unseen)])
        self.outcome.settle("refusals", wrong, less if unseen else "")


def build(language: Language) -> None:
    """Build a language's programs; its commands leave alone what is current."""
    for command in language.build:
        subprocess.run(command, check=True, timeout=BUILD_SECONDS_MAX)


async def run(clients: Sequence[tuple[Language, Client]]) -> dict[Client, Outcome]:
    """Return what each of these clients did."""
    async with stage() as found, AsyncExitStack() as stack:
        pairs = []
        for language, client in clients:
            ways = (found.direct, found.proxied)
            both = [await stack.enter_async_context(started(client, language, w)) for w in ways]
            pairs.append(Pair(Outcome(client), *both))
        for pair in pairs:
            await _alone(found, pair)
        await _together(found, pairs)
        for pair in pairs:
            await _close(found, pair)
    return {pair.outcome.client: pair.outcome for pair in pairs}


async def _alone(found: Stage, pair: Pair) -> None:
    """Ask one program what takes no waiting."""
    pair.outcome.version = " ".join(await pair.proxied.ask("version"))
    before = await found.ends()
    for step in STEPS:
        await pair.take(step)
    for command, kind in REFUSALS:
        await pair.be_refused(command, kind.value)
    _count(pair.outcome, dict(await found.ends() - before))


async def _together(found: Stage, pairs: Sequence[Pair]) -> None:
    """Open all pools, and ask them again after each thing that they must outlive."""
    await asyncio.gather(*(pair.take(POOL) for pair in pairs))
    events: dict[str, Callable[[], Awaitable[None]]] = {
        "tokens": found.outlive_tokens,
        "sleep": found.sleep,
        "restart": found.restart,
    }
    for check, happen in events.items():
        before = await found.ends()
        await happen()
        if check == "tokens":  # what ended would be opened again, and not be seen
            lost = _lost(await found.ends() - before)
            assert not lost, f"sessions ended with their tokens: {lost}"
        await asyncio.gather(*(pair.take(Step(check, *AGAIN)) for pair in pairs))
        if check != "tokens":  # some clients notice an end only when they use the session
            assert await found.ends() != before, f"no session ended by this: {check}"
    tokens = {record.token for record in found.lakebase.gateway.sessions}
    assert len(tokens) > 1, "no token was renewed"


async def _close(found: Stage, pair: Pair) -> None:
    """Close the pool of one program and end it; its sessions must be counted as completed."""
    before = await found.ends()
    await pair.take(Step("close", "close", "closed"))
    codes = [await one.end() for one in (pair.direct, pair.proxied)]
    pair.outcome.settle("close", f"exit codes {codes}" if any(codes) else "")
    _count(pair.outcome, dict(await found.ends() - before))


def _lost(ends: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    return {how: number for how, number in ends.items() if how[0] != "completed"}


def _count(outcome: Outcome, ends: Mapping[tuple[str, str], int]) -> None:
    lost = _lost(ends)
    outcome.settle("close", f"the proxy counted {lost}" if lost or not ends else "")


assert {step.check for step in STEPS} <= CHECKS.keys()
