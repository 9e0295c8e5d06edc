"""One operation that ends at any of its points, and every way on from what it leaves.

For: `e2e/test_catalogue_crashes.py`. The points are those that the operation passes, by their
number: a first run records them. A process is killed at each; from each state that it leaves, as
far as it is a new one, `ops resume`, `ops undo` and another writer go on. Or a database is down
from a point on, until the verb has given up.

Old or new: what all rows say, but for epochs, is what they said before, or what they say after an
operation that nothing disturbed.
"""

import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Final, Self
from uuid import UUID

import asyncpg

from proxy.catalogue.operation import UNDOING, Reach, pass_by
from proxy.catalogue.operation_kinds import KINDS
from proxy.exit_codes import EXIT_OK, EXIT_PENDING
from tests.support.catalogue import MAP, SHARD_NAMES
from tests.support.direct_verbs import Fail, Servers, answer_of, never, reason_of, run_directly
from tests.support.invariants import check_invariants
from tests.support.kept_rows import KeptRows, Rows, differences, read_rows, write_tables
from tests.support.killed_verb import KilledVerbs
from tests.support.operating import LOOKING, Operating, Slept, until
from tests.support.shards_cli import Answer

NextWriter = Callable[[Operating, str], Awaitable[None]]
"""Changes the same shard, whatever the operation left there."""

Prepare = Callable[[Operating], Awaitable[str | None]]
"""Prepares what the verb changes. It may return the report that the verb needs."""
REPORT: Final = "REPORT"
"""The word that stands for it."""

SUPERUSER: Final = "postgres"
# What may refuse to complete, or to undo, an operation that was left pending.
ONLY_UNDO: Final = "operation_pending"
ONLY_RESUME: Final = "not_undoable"
_OTHERS: Final = (
    "select count(*) from pg_stat_activity where usename = $1 and application_name <> $2"
    " and datname = current_database()"
)
_REGISTER: Final = (
    "insert into shardmap_local.session (pid, backend_start, mapping_id, epoch, key, proxy)"
    " select pid, backend_start, $2, $3, $4, 'test' from pg_stat_activity where pid = $1"
)
_END: Final = (
    "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = $1"
    " and application_name <> $2 and datname = current_database()"
)


class Crashes:
    """One kind of operation on one map. Use it with `async with`."""

    def __init__(
        self,
        operating: Operating,
        verbs: KilledVerbs,
        servers: Servers,
        *,
        kind: str,
        words: tuple[str, ...],
        next_writer: NextWriter,
    ) -> None:
        self.operating = operating
        self.kind = kind
        self._verbs = verbs
        self._servers = servers
        self._words = words
        self._next_writer = next_writer
        self._stack = AsyncExitStack()
        self._before: KeptRows
        self._after: KeptRows
        self._recovers = False
        self._tried: set[str] = set()

    async def __aenter__(self) -> Self:
        shards, kept = self.operating.shards, await self._keep()
        self.operating.shards = dict(shards)
        self._stack.callback(setattr, self.operating, "shards", shards)
        self._stack.push_async_callback(self._restore, kept)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def start(self, prepare: Prepare) -> None:
        """Prepare, keep what is there, and what a verb that nothing disturbs makes of it."""
        report = await prepare(self.operating) or ""
        self._words = tuple(word.replace(REPORT, report) for word in self._words)
        try:
            await self.operating.check_settled()
        except AssertionError:
            self._recovers = True
        await self._populate()
        self._before = await self._keep()
        await self._succeed("an undisturbed call")
        await self.operating.check_settled()
        self._after = await self._keep()
        assert self._after.settled() != self._before.settled(), "it changes something"

    # -- what is tried ---------------------------------------------------------------------------

    async def killed_everywhere(self) -> None:
        """Kill the verb at each of its points; and at those of undo, after a first and a last step.

        Between these two, undo takes back what it does for the late one, or less.
        """
        doing = await self._record()
        for number, point in enumerate(doing):
            if not point.endswith(".done") or number == len(doing) - 1:
                await self._killed(number, point)
        undone = await self._undone(doing)
        for failing in sorted({min(undone), max(undone)}):
            for number, point in enumerate(undone[failing]):
                if number > failing and not point.endswith(".done"):
                    await self._killed(number, f"{point} after {doing[failing]}", failing)

    async def down_everywhere(self) -> None:
        """Run the verb with a database down from each of its points on."""
        for number, point in enumerate(await self._record()):
            if not point.endswith(".done"):
                for server in (MAP, *SHARD_NAMES):
                    await self._down(number, point, server)

    async def _record(self, failing: int = -1) -> list[str]:
        """Return the points that the verb passes; the point `failing` fails."""
        passed: list[str] = []

        async def reach(point: str) -> None:
            passed.append(point)
            if len(passed) - 1 == failing:
                raise asyncpg.InternalServerError("failed by the test")

        await self._restore(self._before)
        await self._call(*self._words, reach=reach)
        return passed

    async def _undone(self, doing: list[str]) -> dict[int, list[str]]:
        """Return what is passed where a commit fails and all is undone, by the commit's number."""
        found = {}
        for failing, point in enumerate(doing):
            if point.endswith(".commit") and point != "begin.commit":
                passed = await self._record(failing)
                if "undo" in passed:
                    found[failing] = passed
        return found

    async def _killed(self, number: int, point: str, failing: int = -1) -> None:
        await self._restore(self._before)
        ended = await self._verbs.run(number, *self._words, failing=failing, servers=self._servers)
        assert ended == -signal.SIGKILL, point
        await self._alone()
        await self._go_on(f"killed at {point}")

    async def _down(self, number: int, point: str, server: str) -> None:
        """End the connections to a server at a point, and refuse new ones."""
        is_down, passed = False, 0

        def fail(name: str) -> None:
            if is_down and name == server:
                raise ConnectionRefusedError(f"{name} is down")

        async def reach(_: str) -> None:
            nonlocal is_down, passed
            if passed == number:
                is_down = True
                await self._end_all(server, self.operating.stores.roles.admin)
            passed += 1

        await self._restore(self._before)
        answer = await self._call(*self._words, reach=reach, fail=fail)
        what = f"{server} is down from {point} on"
        log = await self.operating.fetch(MAP, "select state from shardmap.op_log")
        if answer.code != EXIT_PENDING:
            assert not log, f"{what}: {answer}"
            expected = self._after if answer.code == EXIT_OK else self._before
            assert not (found := differences(await self._keep(), expected)), (what, answer, found)
        await self._go_on(what)

    # -- the ways on -----------------------------------------------------------------------------

    async def _go_on(self, what: str) -> None:
        """Try every way on from what was left, if it was not left before."""
        left = await self._keep()
        pending = await self.operating.fetch(MAP, "select op_id, state from shardmap.op_log")
        try:
            await check_invariants(self.operating, recovering=self._recovers)
            if left.alike() in self._tried:
                return
            self._tried.add(left.alike())
            if not pending:
                await self._reached(what)
                return
            ((op_id, state),) = pending
            for way in (self._resume, self._undo, self._write):
                await self._restore(left)
                await way(str(op_id), state)
                await self._reached(f"{what}, {state}, {way.__name__}")
        except AssertionError as error:
            error.add_note(f"{self.kind} {what}")
            raise

    async def _resume(self, op_id: str, state: str) -> None:
        answer = await self._call("ops", "resume", op_id)
        if answer.code != EXIT_OK:
            assert reason_of(answer) == ONLY_UNDO, answer
            assert state == UNDOING or not KINDS[self.kind].resumable, answer
            await self._succeed("undo", "ops", "undo", op_id)
            await self._is(self._before)
        else:
            await self._is(self._after)

    async def _undo(self, op_id: str, _: str) -> None:
        answer = await self._call("ops", "undo", op_id)
        if answer.code != EXIT_OK:
            assert reason_of(answer) == ONLY_RESUME, answer
            await self._succeed("resume", "ops", "resume", op_id)
            await self._is(self._after)
        else:
            await self._is(self._before)

    async def _write(self, *_: str) -> None:
        await self._next_writer(self.operating, self.kind)

    async def _is(self, expected: KeptRows) -> None:
        assert not (found := differences(await self._keep(), expected)), found

    async def _reached(self, what: str) -> None:
        """Check that all is as before, or as after; from before, the same call succeeds."""
        found = await self._keep()
        if not differences(found, self._after):
            await self.operating.check_settled()
            return
        assert not (half := differences(found, self._before)), f"{what}: not as before: {half}"
        assert not await self.operating.fetch(MAP, "select from shardmap.op_log"), what
        await check_invariants(self.operating, recovering=self._recovers)
        await self._succeed(f"the same call, {what}")
        await self.operating.check_settled()
        await self._is(self._after)

    async def _call(self, *words: str, reach: Reach = pass_by, fail: Fail = never) -> Answer:
        return await answer_of(run_directly(self._servers, words, reach, fail, Slept()))

    async def _succeed(self, what: str, *words: str) -> None:
        answer = await self._call(*(words or self._words))
        assert answer.code == EXIT_OK, f"{what}: {answer}"

    # -- rows and sessions -----------------------------------------------------------------------

    async def _superuser(self, name: str) -> Any:
        return await self.operating.connected(name, SUPERUSER)

    async def _keep(self) -> KeptRows:
        role, found = self.operating.stores.roles.session, {}
        for name in (MAP, *SHARD_NAMES):
            found[name] = await read_rows(await self._superuser(name), name, role)
        return KeptRows.of(found)

    async def _restore(self, kept: KeptRows) -> None:
        """Write rows and rights back, and have sessions live as they did."""
        for name, tables in kept.tables.items():
            connection = await self._superuser(name)
            await write_tables(connection, tables)
            if name != MAP:
                await self._set_right(connection, granted=name in kept.granted)
                await self._revive(name, connection, kept.sessions[name])

    async def _set_right(self, connection: Any, *, granted: bool) -> None:
        role = self.operating.stores.roles.session
        verb, word = ("grant", "to") if granted else ("revoke", "from")
        await connection.execute(
            f'{verb} execute on function shardmap_local.admit {word} "{role}";'
            f'{verb} usage on schema shardmap_local {word} "{role}"'
        )

    async def _revive(self, name: str, connection: Any, sessions: Rows) -> None:
        await self._end_all(name, self.operating.stores.roles.session)
        await connection.execute("delete from shardmap_local.session")
        for session in sessions:
            opened = await self._opened(name)
            pid = await opened.fetchval("select pg_backend_pid()")
            values = UUID(session["mapping_id"]), session["epoch"], bytes.fromhex(session["key"])
            await connection.execute(_REGISTER, pid, *values)

    async def _populate(self) -> None:
        """Open a session for each mapping that is served."""
        for row in await self.operating.fetch(MAP, "select * from shardmap.mapping"):
            name = self.operating.name_of(row["shard_id"])
            opened = await self._opened(name)
            key = row["lo"] or self.operating.key(-(2**31))
            with suppress(asyncpg.InsufficientPrivilegeError):
                await self.operating.admit(opened, name, row, key)

    async def _opened(self, name: str) -> Any:
        stores = self.operating.stores
        return await self._stack.enter_async_context(stores.connect(name, stores.roles.session))

    async def _end_all(self, name: str, role: str) -> None:
        connection = await self._superuser(name)
        await connection.fetchval(_END, role, LOOKING)

    async def _alone(self) -> None:
        """Wait until the servers have noticed the end of the process that was killed."""
        admin = self.operating.stores.roles.admin

        async def are_gone() -> bool:
            counts = [
                await (await self._superuser(name)).fetchval(_OTHERS, admin, LOOKING)
                for name in (MAP, *SHARD_NAMES)
            ]
            return not any(counts)

        await until(are_gone, "the connections of the process that was killed have ended")
