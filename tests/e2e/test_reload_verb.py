"""`reload`, `POST /reload` and `reload.watch`, as in a pod. Signals are in `test_reload`."""

import sys
from pathlib import Path

import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.exit_codes import EXIT_OK, EXIT_USAGE
from tests.support.admin_address import ask
from tests.support.proxy_process import (
    START_SECONDS_MAX,
    run_to_end,
    started_process,
)
from tests.support.running import eventually, proxy_values, toml
from tests.support.sharding import Section, range_map, shard_by_psycopg, sharded

pytestmark = pytest.mark.slow

RELOADED = "reloaded"
WATCHED: Section = {"watch": True}
OVERLAP = [{"low": 1, "high": 9, "target": "one"}, {"low": 5, "target": "one"}]


class ConfigMap:
    """A ConfigMap as Kubernetes mounts it: each version is a directory, to which `..data` links."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._versions = 0
        self.file = directory / "proxy.toml"
        self.file.symlink_to(Path("..data") / "proxy.toml")

    def publish(self, text: str) -> None:
        """Replace the contents in one step."""
        self._versions += 1
        version = self._directory / f"..{self._versions}"
        version.mkdir()
        (version / "proxy.toml").write_text(text)
        link = self._directory / "..new"
        link.symlink_to(version.name)
        link.replace(self._directory / "..data")


async def reload_verb(config: Path) -> tuple[int, str, str]:
    return await run_to_end(sys.executable, "-m", "proxy", "reload", "--config", str(config))


async def test_a_config_map_is_reloaded_by_the_verb_and_by_itself(
    lakebase: Lakebase, tmp_path: Path, unused_tcp_port: int
) -> None:
    admin: Section = {"enabled": True, "port": unused_tcp_port}
    config_map = ConfigMap(tmp_path)

    def publish(**sections: Section) -> None:
        given = {"admin": admin, **sharded(lakebase), **sections}
        config_map.publish(toml(proxy_values(lakebase, given)))

    publish()
    async with started_process("run", "--config", str(config_map.file)) as proxy:
        await proxy.serving()
        assert await reload_verb(config_map.file) == (EXIT_OK, "nothing has changed\n", "")

        publish(listen={"port": 0, "max_connections": 7}, shutdown={"drain_seconds": 1})
        said = (
            "changed: shutdown.drain_seconds\n"
            "restart to let it take effect: listen.max_connections\n"
        )
        assert await reload_verb(config_map.file) == (EXIT_OK, said, "")

        # What only the proxy finds: the verb itself does not look at the mappings.
        overlapping = sharded(lakebase, {**range_map(["one"]), "mappings": OVERLAP})
        publish(**overlapping)
        code, out, err = await reload_verb(config_map.file)
        assert (code, out) == (EXIT_USAGE, "")
        assert "the configuration is not valid; it stays as it was" in err
        assert "mapping 1 (on one) and mapping 2" in err
        foreign = "Host: localhost\r\nOrigin: https://example.com\r\n"
        assert (await ask(unused_tcp_port, "/reload", "POST", headers=foreign)).status == 403

        reloads = len(proxy.events(RELOADED))
        publish(reload=WATCHED)
        assert (await reload_verb(config_map.file))[0] == EXIT_OK
        publish(reload=WATCHED, **sharded(lakebase, range_map(["two", "one"])))
        both = lambda: len(proxy.events(RELOADED)) == reloads + 2  # noqa: E731
        await eventually(both, RELOADED, START_SECONDS_MAX)
        assert await shard_by_psycopg(proxy, dbname="app@7") == "two"
        assert "Traceback" not in proxy.err
