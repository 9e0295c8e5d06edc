"""`shards VERB` over direct connections: unix sockets, without TLS, tokens and the dialer.

For: tests that run a verb hundreds of times, in this process or in a forked one. What connects is
replaced, nothing else. Not for: the connections of the command line, which `shards_cli` has.
"""

import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

import asyncpg

from proxy.catalogue.errors import CatalogueError, driver_errors, translated
from proxy.catalogue.model import Shard, Sleep
from proxy.catalogue.operation import Reach, pass_by
from proxy.config import Settings, UpstreamSettings
from proxy.exit_codes import EXIT_OK
from proxy.verbs.shards import read
from proxy.verbs.shards.administration import Administration
from proxy.verbs.shards.output import Output
from proxy.verbs.shards.verb import Call
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.shards_cli import Answer

Fail = Callable[[str], None]
"""Called with a server's name before each connection; may raise."""


def never(_: str) -> None:
    """Refuse no connection."""


@dataclass(frozen=True)
class Servers:
    """Where the servers are; it can be sent to another process as JSON."""

    directories: Mapping[str, str]  # by the server's name
    names: Mapping[str, str]  # of servers, by host
    hosts: Mapping[str, str]  # by endpoint or instance
    database: str
    role: str
    config: str

    @classmethod
    def of(cls, stores: Stores, config: str) -> Self:
        """Return the servers of `stores`, with a file of settings that lead there.

        Each has two hosts, of an endpoint and of an instance.
        """
        shards = [stores.lakebase[name] for name in SHARD_NAMES]
        return cls(
            {name: str(cluster.directory) for name, cluster in stores.clusters.items()},
            {one.host: shard.name for shard in shards for one in (shard.endpoint, shard.instance)},
            {one.name: one.host for shard in shards for one in (shard.endpoint, shard.instance)},
            stores.database,
            stores.roles.admin,
            config,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what makes the same object in another process."""
        return asdict(self)


class DirectAdministration(Administration):
    """Connects directly, as the administrator."""

    def __init__(self, settings: Settings, servers: Servers, fail: Fail = never) -> None:
        self.settings = settings
        self._servers = servers
        self._fail = fail

    @asynccontextmanager
    async def catalogue(self) -> AsyncIterator[Any]:
        """Yield a connection to the catalogue. Raises CatalogueError."""
        async with self._connect(MAP, "the catalogue") as connection:
            yield connection

    @asynccontextmanager
    async def shard(self, shard: Shard) -> AsyncIterator[Any]:
        """Yield a connection to a shard. Raises CatalogueError."""
        name = self._servers.names[shard.host]
        async with self._connect(name, f"shard {shard.name}") as connection:
            yield connection

    async def catalogue_host(self) -> str:
        """Return a host that no shard has."""
        return MAP

    async def check_shard(self, shard: Shard) -> None:
        """Check nothing: a direct connection gets no token."""

    async def host_of(self, settings: UpstreamSettings) -> str:
        """Return the host of an endpoint or an instance."""
        return self._servers.hosts[settings.endpoint or settings.instance]

    @asynccontextmanager
    async def _connect(self, name: str, where: str) -> AsyncIterator[Any]:
        connection = None
        try:
            self._fail(name)
            connection = await asyncpg.connect(
                host=self._servers.directories[name],
                user=self._servers.role,
                database=self._servers.database,
                password="",
                ssl=False,
                statement_cache_size=0,
            )
            yield connection
        except driver_errors() as error:
            raise translated(error, where) from error
        finally:
            if connection is not None:
                with suppress(*driver_errors()):  # a test may have ended it
                    await connection.close()


async def run_directly(
    servers: Servers,
    arguments: tuple[str, ...],
    reach: Reach = pass_by,
    fail: Fail = never,
    sleep: Sleep | None = None,
) -> int:
    """Run a verb, which prints. Return its exit code."""
    word, *rest = arguments
    verb, parsed, settings = read([word, "--json", "--config", servers.config, *rest])
    output = Output(as_json=True)
    administration = DirectAdministration(settings, servers, fail)
    call = Call(parsed, administration, output, reach)
    if sleep is not None:
        call = Call(parsed, administration, output, reach, sleep)
    try:
        await verb.run(call)
    except CatalogueError as error:
        return output.refuse(error)
    finally:
        output.progress.stop()
    return EXIT_OK


async def answer_of(running: Awaitable[int]) -> Answer:
    """Return the exit code of a verb that runs in this process, and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = await running
    return Answer(code, out.getvalue(), err.getvalue())


def reason_of(answer: Answer) -> str:
    """Return the reason of a refusal with --json; empty for what succeeded."""
    facts: dict[str, Any] = json.loads(answer.out)
    return str(facts.get("reason", ""))
