"""The operator's own command that copies the rows of a mapping while it is offline.

For: running it by /bin/sh with connection URIs to both shards in its environment, ending it in
time, and its last words when it fails. Not for: what the URIs lead to (`session.private_listener`).

Invariant: no token is in its environment, its arguments or a file. What it has started is ended
with it: nothing of its process group writes after the move goes on or is undone. What has left the
group (setsid) lives on, but its connections to the shards are closed.
"""

import asyncio
import codecs
import fcntl
import os
import re
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from proxy.catalogue.bounds import show_bounds
from proxy.catalogue.errors import CatalogueError, Reason
from proxy.catalogue.model import CatalogueMap, Shard
from proxy.catalogue.model import Mapping as MappingRow

# From SIGTERM to SIGKILL.
TERMINATE_SECONDS_MAX: Final = 5.0
_GROUP_POLL_SECONDS: Final = 0.02
# What has left the process group may still hold the other end.
_STDERR_SECONDS_MAX: Final = 2.0
_READ_BYTES: Final = 64 << 10
LINE_CHARACTERS_MAX: Final = 300
_UNPRINTABLE: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
# Beside what the SDK logs in with: our settings, what may be near to a login, and what would change
# the command's connections.
_NOT_PASSED: Final = re.compile("LAKEBASE_.*|ENDPOINT_NAME|ARM_.*|OIDC_TOKEN|PG.*")
# A socket's file has a port in its name; these are on no network.
_PORTS: Final = {"SHARDS_SOURCE": 1, "SHARDS_TARGET": 2}
_FOLDER_PREFIX: Final = "shards-copy-"
# Another process may remove a new folder, before it is locked.
_FOLDER_TRIES: Final = 3
_OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

Lock = Callable[[int, int], None]
"""Locks an open file, as `flock` does. Raises OSError."""

Listen = Callable[[Shard, Path], AbstractAsyncContextManager[None]]
"""Serves a unix socket at a path with sessions of a shard, as administrator."""


@dataclass(frozen=True, slots=True)
class CopyCommand:
    """A command for /bin/sh; `timeout_seconds` of 0 is no limit.

    It gets the environment without what would lead libpq elsewhere.
    """

    text: str
    timeout_seconds: float
    listen: Listen
    environment: Mapping[str, str]

    async def run(
        self, catalogue_map: CatalogueMap, mapping: MappingRow, source: Shard, target: Shard
    ) -> None:
        """Run the command and wait for its end. Raises CatalogueError: COPY_FAILED."""
        spec = catalogue_map.spec
        low, high = show_bounds(spec, mapping.lo, mapping.hi)
        facts = {
            "SHARDS_MAP": catalogue_map.name,
            "SHARDS_KIND": str(spec.kind),
            "SHARDS_KEY_TYPE": str(spec.key_type),
            "SHARDS_LOW": low,
            "SHARDS_HIGH": high,
        }
        shards = {"SHARDS_SOURCE": source, "SHARDS_TARGET": target}
        async with self._listening(shards) as uris:
            await self._run({**_passed_on(self.environment), **facts, **uris})

    @asynccontextmanager
    async def _listening(self, shards: Mapping[str, Shard]) -> AsyncIterator[dict[str, str]]:
        """Yield the URI of each shard; they lead there while the block runs."""
        async with AsyncExitStack() as stack:
            try:
                folder = stack.enter_context(socket_folder())
                for name, shard in shards.items():
                    path = Path(folder) / f".s.PGSQL.{_PORTS[name]}"
                    await stack.enter_async_context(self.listen(shard, path))
            except OSError as error:
                text = f"no socket for the copy command: {error}"
                raise CatalogueError(Reason.COPY_FAILED, text) from error
            yield {name: _uri(folder, _PORTS[name], shard) for name, shard in shards.items()}

    async def _run(self, environment: Mapping[str, str]) -> None:
        words, code, is_ended = LastLine(), None, True
        async with _pipe() as (stderr, write_end):
            process = await self._start(environment, write_end)
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(_pass_on(stderr, words))
                try:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self.timeout_seconds or None):
                            code = await process.wait()
                finally:
                    is_ended = await end_group(process.pid)
                    await asyncio.wait((reading,), timeout=_STDERR_SECONDS_MAX)
                    reading.cancel()
                    await process.wait()
        if not is_ended:
            text = "the copy command has left processes of another user, which cannot be ended"
            raise CatalogueError(Reason.COPY_FAILED, f"{text} (process group {process.pid})")
        if code != 0:
            text = f"the copy command {self._ended(code)}"
            raise CatalogueError(Reason.COPY_FAILED, f"{text}: {words}" if str(words) else text)

    async def _start(self, environment: Mapping[str, str], stderr: int) -> Process:
        """Start the command and close our end of its standard error. Raises CatalogueError."""
        started = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", self.text),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # standard output has the answer of the verb alone
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        )
        try:
            return await asyncio.shield(started)
        except asyncio.CancelledError:  # it may have begun to run
            process = await started
            await end_group(process.pid)
            await process.wait()
            raise
        except OSError as error:
            text = f"the copy command cannot be started: {error}"
            raise CatalogueError(Reason.COPY_FAILED, text) from error
        finally:
            os.close(stderr)

    def _ended(self, code: int | None) -> str:
        if code is None:
            return f"did not end within {self.timeout_seconds:g} s"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"


class LastLine:
    """The last line of a stream that is not empty, printable and of bounded length."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._begun = ""

    def add(self, read: bytes) -> str:
        """Add what was read next. Return it as text."""
        text = self._decoder.decode(read)
        *lines, begun = (self._begun + text).splitlines(keepends=False) or [""]
        if text.endswith(("\n", "\r")):
            lines, begun = [*lines, begun], ""
        for line in lines:
            self._line = _printable(line) or self._line
        self._begun = begun[:LINE_CHARACTERS_MAX]
        return text

    def __str__(self) -> str:
        return _printable(self._begun) or self._line


def _printable(line: str) -> str:
    return _UNPRINTABLE.sub(" ", line[:LINE_CHARACTERS_MAX]).strip()


@asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """Yield the read end of a pipe and its write end, which the block closes.

    With a pipe of asyncio's own, to wait for a process is to wait for all that hold the pipe.
    """
    read_end, write_end = os.pipe()
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb", 0)
    )
    try:
        yield stream, write_end
    finally:
        transport.close()


async def _pass_on(stream: asyncio.StreamReader, words: LastLine) -> None:
    """Pass the command's standard error on to ours, until it ends."""
    while read := await stream.read(_READ_BYTES):
        text = words.add(read)
        with suppress(OSError):  # nothing reads ours any more: the copy goes on
            sys.stderr.write(text)
            sys.stderr.flush()


async def end_group(
    group: int,
    kill: Callable[[int, int], None] = os.killpg,
    seconds_max: float = TERMINATE_SECONDS_MAX,
) -> bool:
    """End what is left of a process group, after `seconds_max` by SIGKILL.

    Return whether that could be done: we may not signal processes of another user.
    """
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            kill(group, signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds_max):
                while True:
                    with suppress(PermissionError):
                        kill(group, 0)
                    await asyncio.sleep(_GROUP_POLL_SECONDS)
        try:
            kill(group, signal.SIGKILL)
        except PermissionError:
            return False
    return True


@contextmanager
def socket_folder(lock: Lock = fcntl.flock) -> Iterator[str]:
    """Yield a new folder of mode 0700, which is locked while it is in use. Raises OSError.

    Those of processes that were killed are removed first: their locks have ended with them. A
    filesystem without locks keeps what they left, as nothing there can be known to be unused.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        _remove_unlocked(left, lock)
    with ExitStack() as stack:
        for _ in range(_FOLDER_TRIES):
            made = tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX, ignore_cleanup_errors=True)
            folder = stack.enter_context(made)
            with suppress(OSError):
                descriptor = os.open(folder, _OPEN_FOLDER)
                stack.callback(os.close, descriptor)
                lock(descriptor, fcntl.LOCK_EX)
            if Path(folder).is_dir():
                yield folder
                return
        raise FileNotFoundError("each new folder was removed at once")


def _remove_unlocked(folder: Path, lock: Lock) -> None:
    """Remove a folder of ours, unless a process has it locked."""
    with suppress(OSError), ExitStack() as stack:
        descriptor = os.open(folder, _OPEN_FOLDER)
        stack.callback(os.close, descriptor)
        if os.fstat(descriptor).st_uid == os.geteuid():
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what the command does not need."""
    return {name: text for name, text in environment.items() if not _NOT_PASSED.fullmatch(name)}


def _uri(folder: str, port: int, shard: Shard) -> str:
    """Return a connection URI as libpq takes it: of a unix socket the host is its directory."""
    database, host = quote(shard.database, safe=""), quote(folder, safe="")
    return f"postgresql:///{database}?host={host}&port={port}"
