"""`shards VERB` in tests: within this process, for speed, or as the process that people run."""

import io
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.exit_codes import EXIT_OK
from proxy.verbs.shards import answer, read
from tests.support.catalogue import SHARD_NAMES, Stores
from tests.support.proxy_process import run_to_end
from tests.support.secret_canaries import look


@dataclass(frozen=True, slots=True)
class Answer:
    """The exit code, and what was printed."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        found: dict[str, Any] = json.loads(self.out)
        assert self.out.count("\n") == 1
        return found


class Shards:
    """Calls the verbs with the settings of `stores`, as administrator or another identity."""

    def __init__(
        self,
        stores: Stores,
        folder: Path,
        identity: str | None = None,
        **sections: Mapping[str, object],
    ) -> None:
        self.stores = stores
        self.config = str(stores.file(folder, identity, **sections))

    async def __call__(self, *arguments: str | int) -> Answer:
        """Call a verb in this process."""
        out, err = io.StringIO(), io.StringIO()
        word, *rest = map(str, arguments)
        verb, parsed, settings = read([word, "--config", self.config, *rest])
        with redirect_stdout(out), redirect_stderr(err):
            code = await answer(verb, parsed, settings)
        look("the output of a verb", out.getvalue() + err.getvalue())
        return Answer(code, out.getvalue(), err.getvalue())

    async def done(self, *arguments: str | int) -> dict[str, Any]:
        """Call a verb that succeeds with --json; return what it answers beside `ok`."""
        answered = await self("--json" if not arguments else arguments[0], "--json", *arguments[1:])
        assert answered.code == EXIT_OK, answered.out
        facts = answered.facts
        assert facts.pop("ok") is True
        return facts

    async def refused(self, *arguments: str | int) -> tuple[str, str]:
        """Call a verb that is refused with --json; return reason and SQLSTATE."""
        answered = await self(arguments[0], "--json", *arguments[1:])
        assert answered.code != EXIT_OK, answered.out
        facts = answered.facts
        assert facts["ok"] is False
        assert facts["error"]
        assert "hint" in facts
        return facts["reason"], facts["sqlstate"]

    async def process(self, *arguments: str | int) -> Answer:
        """Run the verb as a process of its own."""
        words = [*map(str, arguments), "--config", self.config]
        return Answer(*await run_to_end(sys.executable, "-m", "proxy", "shards", *words))

    async def add(self, low: str, high: str, shard: str) -> None:
        """Add a mapping to the map that is configured."""
        await self.done("add", low, high, "--shard", shard)

    async def set_up(self, kind: str = "range", key_type: str = "int4") -> None:
        """Install the catalogue, create the map `tenants`, and add both shards."""
        await self.done("init")
        await self.done("create", "tenants", "--kind", kind, "--key-type", key_type)
        for name in SHARD_NAMES:
            await self.done("add-shard", name, *self.where(name))

    def where(self, name: str) -> tuple[str, ...]:
        """Return the options of `add-shard` that lead to a server."""
        return ("--endpoint", self.stores.endpoint(name), "--port", str(self.stores.lakebase.port))
